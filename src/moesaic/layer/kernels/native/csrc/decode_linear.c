#include "decode.h"
#include "isa.h"
#include "threads.h"

#include <string.h>

/* Outputs of one task: enough to pay for handing it out, few enough to share evenly. */
enum { CHUNK = 64, ROWS_AT_ONCE = 16 };

typedef struct {
    const moesaic_linears *in;
    const char *x; /* rows as the dot product takes them */
    long x_stride; /* in bytes */
    long rows;
    char *y;
    int x_type, y_type;
} run;

static void chunk_task(void *context, long task, int worker) {
    (void)worker;
    const run *r = context;
    const moesaic_linears *in = r->in;
    const moesaic_isa *isa = moesaic_isa_now;
    long size = moesaic_size_of((int)in->type), y_size = moesaic_size_of(r->y_type), before = 0;
    int j = 0;
    while (task >= (in->out[j] + CHUNK - 1) / CHUNK) {
        task -= (in->out[j] + CHUNK - 1) / CHUNK;
        before += in->out[j++];
    }
    long first = task * CHUNK, outs = in->out[j] - first < CHUNK ? in->out[j] - first : CHUNK;
    const char *weight = (const char *)in->weight[j] + first * in->stride[j] * size;
    float bias[CHUNK];
    if (in->bias[j]) isa->widen[in->type]((const char *)in->bias[j] + first * size, bias, outs);
    char *y = r->y + (r->rows * before + first) * y_size;
    for (long row = 0; row < r->rows; row += ROWS_AT_ONCE) {
        long rows = r->rows - row < ROWS_AT_ONCE ? r->rows - row : ROWS_AT_ONCE;
        float c[ROWS_AT_ONCE * CHUNK];
        memset(c, 0, (size_t)(rows * outs) * sizeof(float));
        if (rows <= STREAM_ROWS) {
            const void *x[STREAM_ROWS];
            for (int i = 0; i < rows; i++) x[i] = r->x + (row + i) * r->x_stride;
            isa->dot_stream[in->type](x, weight, in->stride[j] * size, (int)rows, outs, in->in, c, outs);
        } else for (long o = 0; o < outs; o += TILE_OUT) {
            const void *w[TILE_OUT];
            int count = (int)(outs - o < TILE_OUT ? outs - o : TILE_OUT);
            for (int i = 0; i < count; i++) w[i] = weight + (o + i) * in->stride[j] * size;
            for (long start = 0; start < rows; start += TILE_ROWS) {
                const void *x[TILE_ROWS];
                int height = (int)(rows - start < TILE_ROWS ? rows - start : TILE_ROWS);
                for (int i = 0; i < height; i++) x[i] = r->x + (row + start + i) * r->x_stride;
                isa->dot[in->type](x, w, height, count, in->in, c + start * outs + o, outs);
            }
        }
        for (long i = 0; i < rows; i++) {
            if (in->bias[j]) isa->axpy(1.0f, bias, c + i * outs, outs);
            isa->narrow[r->y_type](c + i * outs, y + (row + i) * in->out[j] * y_size, outs);
        }
    }
}

long moesaic_linears_run(const moesaic_linears *in, const void *x, int64_t x_stride, int64_t rows, void *y, int64_t wide,
                         int64_t threads) {
    const moesaic_isa *isa = moesaic_isa_now;
    long size = moesaic_size_of((int)in->type), tasks = 0;
    run r = {.in = in, .x = x, .x_stride = x_stride * size, .rows = rows, .y = y};
    r.x_type = in->type == MOESAIC_BF16 && isa->dot_bf16 ? MOESAIC_BF16 : MOESAIC_F32;
    r.y_type = wide ? MOESAIC_F32 : (int)in->type;
    if (r.x_type != in->type) {
        long wide_stride = (in->in + 15) / 16 * 16;
        float *values = moesaic_scratch(SLOT_WIDENED, rows * wide_stride * (long)sizeof(float));
        if (!values) return -1;
        for (long row = 0; row < rows; row++) isa->widen[in->type](r.x + row * r.x_stride, values + row * wide_stride, in->in);
        r.x = (const char *)values;
        r.x_stride = wide_stride * (long)sizeof(float);
    }
    for (int j = 0; j < in->count; j++) tasks += (in->out[j] + CHUNK - 1) / CHUNK;
    moesaic_parallel((int)threads, tasks, chunk_task, &r);
    return 0;
}
