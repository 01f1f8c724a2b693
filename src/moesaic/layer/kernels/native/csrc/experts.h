#ifndef MOESAIC_EXPERTS_H
#define MOESAIC_EXPERTS_H

#include <stdint.h>

/* Packed experts and their input. Mirrored field by field in library.py. Strides are in elements. */
typedef struct {
    int32_t type;       /* of x, weights and biases */
    int32_t activation;
    int32_t gated, interleaved;
    int32_t up_transposed, down_transposed; /* stored (in, out), not (out, in): a stored row holds all outputs of one input */
    float alpha, limit; /* of the clamped SwiGLU */
    int64_t threads;
    int64_t tokens, top_k, hidden, width;
    int64_t num_groups; /* experts that have rows */
    const int64_t *expert;  /* [num_groups], which they are */
    const int64_t *row_end; /* [num_groups], one past the last row of each */
    const int64_t *pick;    /* [rows], token * top_k + k of each row */
    const float *weight;    /* [tokens * top_k] */
    const void *x;
    int64_t x_stride;
    const void *up;
    int64_t up_expert_stride, up_row_stride;
    const void *down;
    int64_t down_expert_stride, down_row_stride;
    const void *up_bias; /* or NULL */
    int64_t up_bias_stride;
    const void *down_bias; /* or NULL */
    int64_t down_bias_stride;
    void *saved_up;     /* [rows, 2 * width or width] of the type, or NULL */
    float *y;           /* [tokens, hidden] */
} moesaic_experts;

/* All need at least one row, and give 0, or -1 without memory. The first needs weights that are stored (out, in), the last
 * weights that are stored (in, out). */
long moesaic_experts_forward(const moesaic_experts *in);
long moesaic_experts_forward_packed(const moesaic_experts *in);
long moesaic_experts_forward_columns(const moesaic_experts *in); /* also stored (out, in); see columns.c */
long moesaic_experts_forward_streamed(const moesaic_experts *in);

#endif
