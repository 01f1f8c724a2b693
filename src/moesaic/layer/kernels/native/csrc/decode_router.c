#include "decode.h"
#include "isa.h"
#include "threads.h"

#include <math.h>

/* One token: scores of its logits, the K best of them (ties to the lower expert), and the weights of those. */
static void choose(const moesaic_router *in, float *logits, float *scores, int64_t *index, float *weight, float *spare) {
    long n = in->logits.out[0], k = in->top_k;
    int64_t type = in->logits.type;
    float most = logits[0], sum = 0;
    if (in->round_logits) moesaic_round(type, logits, n, spare);
    for (long i = 1; i < n; i++)
        if (logits[i] > most) most = logits[i];
    for (long i = 0; i < n; i++) scores[i] = in->sigmoid ? 1.0f / (1.0f + expf(-logits[i])) : logits[i];
    if (!in->sigmoid) {
        float share = 1.0f / moesaic_isa_now->exp_sum(scores, most, n);
        for (long i = 0; i < n; i++) scores[i] *= share;
    }
    float *compared = spare;
    for (long i = 0; i < n; i++) compared[i] = scores[i];
    for (long pick = 0; pick < k; pick++) {
        long best = -1;
        for (long i = 0; i < n; i++)
            if (compared[i] >= 0 || compared[i] < 0) /* NaN marks what is taken */
                if (best < 0 || compared[i] > compared[best]) best = i;
        if (best < 0) best = 0;
        index[pick] = best;
        weight[pick] = in->over_selected ? logits[best] : scores[best];
        compared[best] = NAN;
    }
    if (in->over_selected) {
        float share = 1.0f / moesaic_isa_now->exp_sum(weight, most, k);
        for (long i = 0; i < k; i++) weight[i] *= share;
    }
    for (long i = 0; i < k; i++) sum += weight[i];
    for (long i = 0; i < k; i++) {
        if (in->normalize) weight[i] /= sum + (float)in->epsilon;
        weight[i] *= (float)in->scale;
    }
    if (in->round_scores) moesaic_round(type, weight, k, spare);
}

long moesaic_router_step(const moesaic_router *in, const void *x, int64_t x_stride, int64_t rows, float *logits,
                         float *scores, int64_t *index, float *weight, int64_t threads) {
    long n = in->logits.out[0], k = in->top_k;
    if (moesaic_linears_run(&in->logits, x, x_stride, rows, logits, 1, threads) != 0) return -1;
    float *spare = moesaic_scratch(SLOT_NORM, (n + k) * (long)sizeof(float));
    if (!spare) return -1;
    for (long row = 0; row < rows; row++)
        choose(in, logits + row * n, scores + row * n, index + row * k, weight + row * k, spare);
    return 0;
}
