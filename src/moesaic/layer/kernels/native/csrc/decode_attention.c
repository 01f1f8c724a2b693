/* One new token a sequence: projections, norms and rotation of its heads, its key and value into the cache, attention
 * over the cache, and the output projection. Rounds to the model's type wherever the plain modules do. */
#include "decode.h"
#include "isa.h"
#include "threads.h"

#include <math.h>
#include <string.h>

typedef struct {
    const moesaic_attention *in;
    const char *q, *k, *v;   /* [batch, heads * width] and [batch, kv_heads * width] */
    const char *cos, *sin;   /* [width] of each sequence */
    long rotation_stride;    /* between sequences, 0 if they share it */
    char *keys, *values;     /* caches [batch, kv_heads, room, width] */
    long batch_stride, head_stride, length; /* length: with the new token */
    const uint8_t *mask;     /* [batch, length], 0 for what is not looked at; or NULL */
    long mask_stride;
    char *y;                 /* [batch, heads * width] */
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
    const moesaic_isa *isa = moesaic_isa_now;
    int type = (int)in->in.type, x_type = type == MOESAIC_BF16 && isa->dot_bf16 ? MOESAIC_BF16 : MOESAIC_F32;
    long size = moesaic_size_of(type), n = in->width, group = in->heads / in->kv_heads;
    long sequence = task / in->kv_heads, head = task % in->kv_heads;
    long room = (s->length + 15) / 16 * 16;
    float *scratch = moesaic_scratch(1, (group * room + (2 * group + 6) * n) * (long)sizeof(float));
    float *score = scratch, *queries = score + group * room, *mixed = queries + group * n;
    float *cos = mixed + group * n, *sin = cos + n, *value = sin + n, *product = value + n, *spare = product + n;
    isa->widen[type](s->cos + sequence * s->rotation_stride * size, cos, n);
    isa->widen[type](s->sin + sequence * s->rotation_stride * size, sin, n);

    char *keys = s->keys + (sequence * s->batch_stride + head * s->head_stride) * size;
    char *values = s->values + (sequence * s->batch_stride + head * s->head_stride) * size;
    const char *k = s->k + (sequence * in->kv_heads + head) * n * size;
    char *newest = keys + (s->length - 1) * n * size;
    if (in->k_norm.weight) {
        moesaic_norm_rows(&in->k_norm, k, 0, 1, newest);
        k = newest;
    }
    isa->widen[type](k, value, n);
    rotate(type, value, cos, sin, n, product, spare);
    isa->narrow[type](value, newest, n);
    memcpy(values + (s->length - 1) * n * size, s->v + (sequence * in->kv_heads + head) * n * size, (size_t)(n * size));

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
    for (long start = 0; start < s->length; start += TILE_OUT) {
        const void *w[TILE_OUT];
        int count = (int)(s->length - start < TILE_OUT ? s->length - start : TILE_OUT);
        for (int i = 0; i < count; i++) w[i] = keys + (start + i) * n * size;
        for (long g = 0; g < group; g += TILE_ROWS) {
            int rows = (int)(group - g < TILE_ROWS ? group - g : TILE_ROWS);
            for (int i = 0; i < rows; i++) x[i] = (const char *)queries + (g + i) * n * moesaic_size_of(x_type);
            isa->dot[type](x, w, rows, count, n, score + g * room + start, room);
        }
    }
    const uint8_t *mask = s->mask ? s->mask + sequence * s->mask_stride : 0;
    for (long g = 0; g < group; g++) {
        float *row = score + g * room, most = -INFINITY;
        for (long i = 0; i < s->length; i++) {
            row[i] = mask && !mask[i] ? -INFINITY : row[i] * (float)in->scaling;
            if (row[i] > most) most = row[i];
        }
        float share = 1.0f / isa->exp_sum(row, most, s->length);
        for (long i = 0; i < s->length; i++) row[i] *= share;
    }
    isa->mix[type](score, room, group, values, n, s->length, mixed, n);
    isa->narrow[type](mixed, s->y + first_query * n * size, group * n);
}

long moesaic_attention_step(const moesaic_attention *in, const void *x, int64_t x_stride, int64_t batch, const void *cos,
                            const void *sin, int64_t rotation_stride, void *keys, void *values, int64_t batch_stride,
                            int64_t head_stride, int64_t length, const uint8_t *mask, int64_t mask_stride, void *y,
                            int64_t threads) {
    long size = moesaic_size_of((int)in->in.type), q = in->heads * in->width, kv = in->kv_heads * in->width;
    char *rows = moesaic_scratch(2, batch * (2 * q + 2 * kv) * size);
    if (!rows) return -1;
    step s = {.in = in, .q = rows, .k = rows + batch * q * size, .v = rows + batch * (q + kv) * size, .cos = cos, .sin = sin};
    s.rotation_stride = rotation_stride;
    s.keys = keys, s.values = values, s.batch_stride = batch_stride, s.head_stride = head_stride, s.length = length;
    s.mask = mask, s.mask_stride = mask_stride;
    s.y = rows + batch * (q + 2 * kv) * size;
    if (moesaic_linears_run(&in->in, x, x_stride, batch, rows, 0, threads) != 0) return -1;
    moesaic_parallel((int)threads, batch * in->kv_heads, head_task, &s);
    return moesaic_linears_run(&in->out, s.y, q, batch, y, 0, threads);
}
