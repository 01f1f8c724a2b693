/* What one step of decoding needs besides experts: a few rows through projections, norms, routers and attention. */
#ifndef MOESAIC_DECODE_H
#define MOESAIC_DECODE_H

#include <stdint.h>

enum { LINEARS_MOST = 4 };

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
    const float *selection_bias; /* or NULL */
} moesaic_router;

/* y holds [rows, out] of each projection, one after the other; `wide` asks for float32 instead of the type. */
long moesaic_linears_run(const moesaic_linears *in, const void *x, int64_t x_stride, int64_t rows, void *y, int64_t wide,
                         int64_t threads);

void moesaic_norm_rows(const moesaic_norm *in, const void *x, int64_t x_stride, int64_t rows, void *y);

/* Rounds to the type and back. `spare` holds n elements. */
void moesaic_round(int64_t type, float *values, long n, void *spare);

#endif
