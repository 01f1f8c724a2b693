#ifndef MOESAIC_BACKWARD_H
#define MOESAIC_BACKWARD_H

#include "experts.h"

/* Gradients of packed experts. Mirrored field by field in library.py. Strides are in elements. Every output may be NULL
 * and is then not computed. Gradients of weights have the layout of the weights. */
typedef struct {
    moesaic_experts forward; /* saved_up is read; y, threads and the rest as in the forward pass */
    int64_t num_experts;
    const void *y_grad;      /* [tokens, hidden] of the type */
    int64_t y_grad_stride;
    float *weight_grad;      /* [tokens * top_k], zero on entry */
    float *x_grad;           /* [tokens, hidden] */
    void *up_grad;           /* like up, expert by expert without gaps */
    void *down_grad;         /* like down */
    float *up_bias_grad;     /* [num_experts, 2 * width or width] */
    float *down_bias_grad;   /* [num_experts, hidden] */
} moesaic_backward;

long moesaic_experts_backward(const moesaic_backward *in);

#endif
