/* One new token a sequence: projections, norms and rotation of its heads, its key and value into the cache, attention
 * over the cache, and the output projection. Rounds to the model's type wherever the plain modules do. */
#include "decode.h"
#include "isa.h"
#include "threads.h"

#include <math.h>
#include <string.h>

typedef struct {
    const moesaic_attention *in;
    const moesaic_place *place;
    const char *q, *k, *v; /* [batch, heads * width] and [batch, kv_heads * width] */
    char *y;               /* [batch, heads * width] */
} step;

/* x cos + rotate_half(x) sin, with the roundings of that expression. */
static void rotate(int64_t type, float *x, const float *cos, const float *sin, long n, float *product, float *spare) {
    long half = n / 2;
    for (long i = 0; i < half; i++) {
        product[i] = -x[half + i] * sin[i];
        product[half + i] = x[i] * sin[half + i];
    }
    for (long i = 0; i < n; i++) x[i] *= cos[i];
    moesaic_round(type, product, n, spare);
    moesaic_round(type, x, n, spare);
    for (long i = 0; i < n; i++) x[i] += product[i];
    moesaic_round(type, x, n, spare);
}

static void head_task(void *context, long task, int worker) {
    (void)worker;
    const step *s = context;
    const moesaic_attention *in = s->in;
    const moesaic_place *at = s->place;
    const moesaic_isa *isa = moesaic_isa_now;
    int type = (int)in->in.type, x_type = type == MOESAIC_BF16 && isa->dot_bf16 ? MOESAIC_BF16 : MOESAIC_F32;
    long size = moesaic_size_of(type), n = in->width, group = in->heads / in->kv_heads;
    long sequence = task / in->kv_heads, head = task % in->kv_heads;
    long room = (at->length + 15) / 16 * 16;
    float *scratch = moesaic_scratch(SLOT_HEAD, (group * room + (2 * group + 6) * n) * (long)sizeof(float));
    float *score = scratch, *queries = score + group * room, *mixed = queries + group * n;
    float *cos = mixed + group * n, *sin = cos + n, *value = sin + n, *product = value + n, *spare = product + n;
    isa->widen[type]((const char *)at->cos + sequence * at->rotation_stride * size, cos, n);
    isa->widen[type]((const char *)at->sin + sequence * at->rotation_stride * size, sin, n);

    char *keys = (char *)at->keys + (sequence * at->batch_stride + head * at->head_stride) * size;
    char *values = (char *)at->values + (sequence * at->batch_stride + head * at->head_stride) * size;
    const char *k = s->k + (sequence * in->kv_heads + head) * n * size;
    char *newest = keys + (at->length - 1) * n * size;
    if (in->k_norm.weight) {
        moesaic_norm_rows(&in->k_norm, k, 0, 1, newest);
        k = newest;
    }
    isa->widen[type](k, value, n);
    rotate(type, value, cos, sin, n, product, spare);
    isa->narrow[type](value, newest, n);
    memcpy(values + (at->length - 1) * n * size, s->v + (sequence * in->kv_heads + head) * n * size, (size_t)(n * size));

    const void *x[TILE_ROWS];
    long first_query = sequence * in->heads + head * group;
    for (long g = 0; g < group; g++) {
        const char *q = s->q + (first_query + g) * n * size;
        if (in->q_norm.weight) {
            moesaic_norm_rows(&in->q_norm, q, 0, 1, spare);
            q = (const char *)spare;
        }
        isa->widen[type](q, value, n);
        rotate(type, value, cos, sin, n, product, spare);
        isa->narrow[x_type](value, (char *)queries + g * n * moesaic_size_of(x_type), n);
    }
    memset(score, 0, (size_t)(group * room) * sizeof(float));
    for (long start = 0; start < at->length; start += TILE_OUT) {
        const void *w[TILE_OUT];
        int count = (int)(at->length - start < TILE_OUT ? at->length - start : TILE_OUT);
        for (int i = 0; i < count; i++) w[i] = keys + (start + i) * n * size;
        for (long g = 0; g < group; g += TILE_ROWS) {
            int rows = (int)(group - g < TILE_ROWS ? group - g : TILE_ROWS);
            for (int i = 0; i < rows; i++) x[i] = (const char *)queries + (g + i) * n * moesaic_size_of(x_type);
            isa->dot[type](x, w, rows, count, n, score + g * room + start, room);
        }
    }
    const uint8_t *mask = at->mask ? at->mask + sequence * at->mask_stride : 0;
    for (long g = 0; g < group; g++) {
        float *row = score + g * room, most = -INFINITY;
        for (long i = 0; i < at->length; i++) {
            row[i] = mask && !mask[i] ? -INFINITY : row[i] * (float)in->scaling;
            if (row[i] > most) most = row[i];
        }
        float share = 1.0f / isa->exp_sum(row, most, at->length);
        for (long i = 0; i < at->length; i++) row[i] *= share;
    }
    isa->mix[type](score, room, group, values, n, at->length, mixed, n);
    isa->narrow[type](mixed, s->y + first_query * n * size, group * n);
}

long moesaic_attention_step(const moesaic_attention *in, const void *x, int64_t x_stride, int64_t batch,
                            const moesaic_place *place, void *y, int64_t threads) {
    long size = moesaic_size_of((int)in->in.type), q = in->heads * in->width, kv = in->kv_heads * in->width;
    char *rows = moesaic_scratch(SLOT_HEADS, batch * (2 * q + 2 * kv) * size);
    if (!rows) return -1;
    step s = {.in = in, .place = place, .q = rows, .k = rows + batch * q * size, .v = rows + batch * (q + kv) * size};
    s.y = rows + batch * (q + 2 * kv) * size;
    if (moesaic_linears_run(&in->in, x, x_stride, batch, rows, 0, threads) != 0) return -1;
    moesaic_parallel((int)threads, batch * in->kv_heads, head_task, &s);
    return moesaic_linears_run(&in->out, s.y, q, batch, y, 0, threads);
}
