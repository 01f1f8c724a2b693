#include "decode.h"
#include "isa.h"
#include "threads.h"

#include <math.h>
#include <stddef.h>

/* The `count` best experts by their scores, best first, ties to the lower one. `compared` holds n floats. */
static void rank(const float *scores, long n, long count, float *compared, int64_t *order) {
    for (long i = 0; i < n; i++) compared[i] = scores[i];
    for (long place = 0; place < count; place++) {
        long best = -1;
        for (long i = 0; i < n; i++)
            if (compared[i] >= 0 || compared[i] < 0) /* NaN marks what is taken */
                if (best < 0 || compared[i] > compared[best]) best = i;
        if (best < 0) best = 0;
        order[place] = best;
        compared[best] = NAN;
    }
}

/* The last rank that is asked for, or -1 for an expert or a rank that there is not. */
static long last_rank(const int64_t *ask, long wide, long n) {
    long last = 0;
    for (long i = 0; i < wide; i++) {
        if (ask[i] > n || ask[i] < -n) return -1;
        if (ask[i] > last) last = (long)ask[i];
    }
    return last;
}

/* One token: scores of its logits, its picks, and the weights of those. `order`, `kept` and `spare` hold n each. */
static void choose(const moesaic_router *in, const int64_t *ask, long wide, long last, float *logits, float *scores,
                   int64_t *index, float *weight, int64_t *order, float *kept, float *spare) {
    long n = in->logits.out[0], count = 0;
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
    rank(scores, n, last, spare, order);
    for (long i = 0; i < wide; i++) {
        if (!ask) index[i] = order[i];
        else if (ask[i] > 0) index[i] = order[ask[i] - 1];
        else index[i] = ask[i] < 0 ? -1 - ask[i] : n;
        if (index[i] < n) kept[count++] = in->over_selected ? logits[index[i]] : scores[index[i]];
    }
    if (in->over_selected && count) {
        most = kept[0]; /* not that of all, beside which those that were picked may vanish */
        for (long i = 1; i < count; i++)
            if (kept[i] > most) most = kept[i];
        float share = 1.0f / moesaic_isa_now->exp_sum(kept, most, count);
        for (long i = 0; i < count; i++) kept[i] *= share;
    }
    for (long i = 0; i < count; i++) sum += kept[i];
    for (long i = 0; i < count; i++) {
        if (in->normalize) kept[i] /= sum + (float)in->epsilon;
        kept[i] *= (float)in->scale;
    }
    if (in->round_scores) moesaic_round(type, kept, count, spare);
    for (long i = 0, next = 0; i < wide; i++) weight[i] = index[i] < n ? kept[next++] : 0;
}

long moesaic_router_step(const moesaic_router *in, const void *x, int64_t x_stride, int64_t rows, const int64_t *ask,
                         int64_t wide, float *logits, float *scores, int64_t *index, float *weight, int64_t threads) {
    long n = in->logits.out[0], longest = n > wide ? n : wide;
    if (moesaic_linears_run(&in->logits, x, x_stride, rows, logits, 1, threads) != 0) return -1;
    int64_t *order = moesaic_scratch(SLOT_NORM, longest * (long)(sizeof(int64_t) + 2 * sizeof(float)));
    if (!order) return -1;
    float *kept = (float *)(order + longest);
    for (long row = 0; row < rows; row++) {
        const int64_t *asked = ask ? ask + row * wide : NULL;
        long last = asked ? last_rank(asked, wide, n) : wide;
        if (last < 0) return -3;
        choose(in, asked, wide, last, logits + row * n, scores + row * n, index + row * wide, weight + row * wide, order,
               kept, kept + longest);
    }
    return 0;
}
