/* The halves of a decoder layer with norms before them: one call each for a few tokens. */
#include "decode.h"
#include "isa.h"
#include "threads.h"

#include <string.h>

long moesaic_order(const int64_t *index, long picks, long num_experts, int64_t *pick, int64_t *expert, int64_t *row_end);
long moesaic_experts_forward(const moesaic_experts *in);

/* sum = a + b in the type. `spare` holds 2 n floats. */
static void add(int64_t type, const void *a, const void *b, void *sum, long n, float *spare) {
    const moesaic_isa *isa = moesaic_isa_now;
    isa->widen[type](a, spare, n);
    isa->widen[type](b, spare + n, n);
    for (long i = 0; i < n; i++) spare[i] += spare[n + i];
    isa->narrow[type](spare, sum, n);
}

/* x, sum and y are [batch, hidden] and contiguous. */
long moesaic_attention_half_step(const moesaic_attention_half *in, const void *x, int64_t batch, const moesaic_place *place,
                                 void *sum, void *y, int64_t threads) {
    long n = batch * in->before.width;
    int64_t type = in->before.type;
    char *scratch = moesaic_scratch(SLOT_HALF, 2 * n * (long)sizeof(float) + n * moesaic_size_of((int)type));
    if (!scratch) return -1;
    char *row = scratch + 2 * n * (long)sizeof(float);
    moesaic_norm_rows(&in->before, x, in->before.width, batch, row);
    if (moesaic_attention_step(&in->attention, row, in->before.width, batch, place, y, threads) != 0) return -1;
    add(type, x, y, sum, n, (float *)scratch);
    moesaic_norm_rows(&in->after, sum, in->after.width, batch, y);
    return 0;
}

/* x is [rows, hidden], normalised; y is the experts' output, added to `residual` if that is given. */
long moesaic_moe_half_step(const moesaic_moe_half *in, const void *x, int64_t rows, const void *residual,
                           const int64_t *ask, int64_t wide, float *logits, float *scores, int64_t *index, float *weight,
                           void *y, int64_t threads) {
    moesaic_experts call = in->experts;
    long n = rows * call.hidden, picks = rows * wide;
    long failed = moesaic_router_step(&in->router, x, call.hidden, rows, ask, wide, logits, scores, index, weight, threads);
    if (failed) return failed;
    int64_t *order = moesaic_scratch(SLOT_ORDER, 3 * picks * (long)sizeof(int64_t) + 3 * n * (long)sizeof(float));
    if (!order) return -1;
    call.num_groups = moesaic_order(index, picks, in->num_experts, order, order + picks, order + 2 * picks);
    if (call.num_groups < 0) return -1;
    call.y = (float *)(order + 3 * picks);
    call.tokens = rows, call.top_k = wide, call.threads = threads;
    call.pick = order, call.expert = order + picks, call.row_end = order + 2 * picks, call.weight = weight;
    call.x = x, call.x_stride = call.hidden;
    if (!call.num_groups) memset(call.y, 0, (size_t)n * sizeof(float));
    else if (moesaic_experts_forward(&call) != 0) return -1;
    moesaic_isa_now->narrow[call.type](call.y, y, n);
    if (residual) add(call.type, residual, y, y, n, call.y + n);
    return 0;
}
