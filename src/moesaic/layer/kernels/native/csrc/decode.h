/* What one step of decoding needs besides experts: a few rows through projections, norms, routers and attention. */
#ifndef MOESAIC_DECODE_H
#define MOESAIC_DECODE_H

#include "experts.h"

#include <stdint.h>

enum { LINEARS_MOST = 4 };

/* Scratch memory, behind that of the experts. */
enum { SLOT_NORM = 8, SLOT_HEAD, SLOT_HEADS, SLOT_WIDENED, SLOT_HALF, SLOT_ORDER };

/* Projections of the same input: y_j = x W_j^T + b_j. Mirrored in decode.py, as are the others. Strides are in elements. */
typedef struct {
    int64_t type, count, in;
    const void *weight[LINEARS_MOST]; /* [out, in] */
    int64_t stride[LINEARS_MOST];
    int64_t out[LINEARS_MOST];
    const void *bias[LINEARS_MOST]; /* or NULL */
} moesaic_linears;

/* Root mean square normalisation, computed in float32 and rounded to the type before the weight, and after it. */
typedef struct {
    int64_t type, width;
    const void *weight;
    double epsilon;
} moesaic_norm;

/* Attention of one new token a sequence over cached ones, its projections included. Heads of queries share keys in
 * groups; q_norm and k_norm apply to each head before the rotation and may have no weight, which means none. */
typedef struct {
    moesaic_linears in, out;
    moesaic_norm q_norm, k_norm;
    int64_t heads, kv_heads, width;
    double scaling;
} moesaic_attention;

/* Top-k routing by the softmax or sigmoid of linear logits. */
typedef struct {
    moesaic_linears logits; /* one projection, of N outputs */
    int64_t top_k;
    int64_t sigmoid, over_selected, normalize;
    int64_t round_logits, round_scores; /* to the type, as stock routers do */
    double epsilon, scale;
} moesaic_router;

/* The first half of a decoder layer: x + attention(norm(x)), and the norm of that for the second half. */
typedef struct {
    moesaic_norm before, after;
    moesaic_attention attention;
} moesaic_attention_half;

/* The second half: router and packed experts. What belongs to one call is left out of `experts`. */
typedef struct {
    moesaic_router router;
    moesaic_experts experts;
    int64_t num_experts;
} moesaic_moe_half;

/* The new token's place: rotation, cache with room for it, and what it may look at. */
typedef struct {
    const void *cos, *sin;   /* [batch, width] */
    int64_t rotation_stride; /* between sequences, 0 if they share it */
    void *keys, *values;     /* [batch, kv_heads, room, width] */
    int64_t batch_stride, head_stride;
    int64_t length;          /* tokens in the cache, the new one included */
    const uint8_t *mask;     /* [batch, length], 0 for what is not looked at; or NULL */
    int64_t mask_stride;
} moesaic_place;

long moesaic_attention_step(const moesaic_attention *in, const void *x, int64_t x_stride, int64_t batch,
                            const moesaic_place *place, void *y, int64_t threads);

/* `ask` [rows, wide] says the picks of each row: the expert of a rank from 1 on, expert -1 - ask, or for 0 none, whose index
 * is then N and weight 0. NULL for the ranks 1 to `wide`. Gives -3 if there is no such rank or expert. */
long moesaic_router_step(const moesaic_router *in, const void *x, int64_t x_stride, int64_t rows, const int64_t *ask,
                         int64_t wide, float *logits, float *scores, int64_t *index, float *weight, int64_t threads);

/* y holds [rows, out] of each projection, one after the other; `wide` asks for float32 instead of the type. */
long moesaic_linears_run(const moesaic_linears *in, const void *x, int64_t x_stride, int64_t rows, void *y, int64_t wide,
                         int64_t threads);

void moesaic_norm_rows(const moesaic_norm *in, const void *x, int64_t x_stride, int64_t rows, void *y);

/* Rounds to the type and back. `spare` holds n elements. */
void moesaic_round(int64_t type, float *values, long n, void *spare);

#endif
