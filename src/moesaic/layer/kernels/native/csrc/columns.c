/* Forward pass of packed experts by the products of columns.h. Weights are stored (out, in), their numbers of inputs are
 * even, and of outputs multiples of 16. */
#include "columns.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "experts.h"
#include "isa.h"
#include "memory.h"
#include "packed.h"
#include "threads.h"

enum { LDC = COLUMN_LANES * COLUMN_VECTORS, SLOT_SUMS = 0, SLOT_X = 1 };

typedef struct {
    const moesaic_experts *in;
    const moesaic_isa *isa;
    const moesaic_column_products *columns;
    const moesaic_segment *blocks;
    const long *place; /* of each block in h, in pairs */
    long num_blocks;
    uint32_t *h;       /* [width / 2][16 * vectors] pairs of each block */
    long features, outputs; /* of one task */
    atomic_int failed;
} pass;

static inline int vectors_of(const moesaic_segment *block) {
    return (int)((block->end - block->start + COLUMN_LANES - 1) / COLUMN_LANES);
}

static void add_bias(const pass *p, const void *bias, long place, float *row, long n) {
    float value;
    p->isa->widen[MOESAIC_BF16]((const uint16_t *)bias + place, &value, 1);
    for (long i = 0; i < n; i++) row[i] += value;
}

/* The first projection and the activation for one block and some features. */
static void up_task(void *context, long task, int worker) {
    (void)worker;
    pass *p = context;
    const moesaic_experts *in = p->in;
    long chunks = parts_of(in->width, p->features), f = task % chunks * p->features, n = least(in->width - f, p->features);
    long which = task / chunks;
    const moesaic_segment *block = &p->blocks[which];
    long rows = block->end - block->start, pairs = in->hidden / 2, halves = in->gated ? 2 : 1;
    int vectors = vectors_of(block);
    long lanes = (long)vectors * COLUMN_LANES;
    uint32_t *x = moesaic_scratch(SLOT_X, pairs * lanes * (long)sizeof *x);
    float *c = moesaic_scratch(SLOT_SUMS, (2 * halves + 2) * COLUMN_LANES * LDC * (long)sizeof *c);
    if (!x || !c) {
        p->failed = 1;
        return;
    }
    const char *row[LDC];
    for (long r = 0; r < rows; r++)
        row[r] = (const char *)in->x + in->pick[block->start + r] / in->top_k * in->x_stride * 2;
    p->isa->pack(1, 1, row, 0, in->hidden, rows, (int)lanes, x);

    long stride = in->up_row_stride * 2, step = in->interleaved ? 2 * stride : stride;
    long apart = in->interleaved ? stride : in->width * stride;
    const char *up = (const char *)in->up + block->expert * in->up_expert_stride * 2;
    float *value = c + 2 * COLUMN_LANES * LDC;
    for (long first = f; first < f + n; first += COLUMN_LANES) {
        for (long half = 0; half < halves; half++) {
            float *sums = c + half * COLUMN_LANES * LDC;
            p->columns->product(up + half * apart + first * step, step, x, vectors, pairs, sums, LDC);
            long place = in->interleaved ? 2 * first + half : half * in->width + first, next = in->interleaved ? 2 : 1;
            if (in->up_bias)
                for (long o = 0; o < COLUMN_LANES; o++)
                    add_bias(p, in->up_bias, block->expert * in->up_bias_stride + place + o * next, sums + o * LDC, lanes);
            if (in->saved_up && !in->interleaved)
                p->columns->save(sums, LDC, (uint16_t *)in->saved_up + block->start * halves * in->width + place,
                                 halves * in->width, rows);
            else if (in->saved_up)
                for (long r = 0; r < rows; r++)
                    for (long o = 0; o < COLUMN_LANES; o++)
                        p->isa->narrow[MOESAIC_BF16](
                            sums + o * LDC + r,
                            (uint16_t *)in->saved_up + (block->start + r) * halves * in->width + place + o * next, 1);
        }
        for (long o = 0; o < COLUMN_LANES; o++)
            p->isa->activate(in->activation, in->alpha, in->limit, c + o * LDC,
                             in->gated ? c + (COLUMN_LANES + o) * LDC : NULL, value + o * LDC, lanes);
        for (long o = 0; o < COLUMN_LANES; o += 2)
            p->columns->pair(value + o * LDC, value + (o + 1) * LDC, p->h + p->place[which] + (first + o) / 2 * lanes, lanes);
    }
}

/* The second projection for some outputs of every row. A task owns its columns of y. */
static void down_task(void *context, long task, int worker) {
    (void)worker;
    pass *p = context;
    const moesaic_experts *in = p->in;
    long d = task * p->outputs, n = least(in->hidden - d, p->outputs);
    float c[COLUMN_LANES * LDC], bias[COLUMN_LANES] = {0}, weight[LDC], *y[LDC];
    for (long t = 0; t < in->tokens; t++) memset(in->y + t * in->hidden + d, 0, (size_t)n * sizeof(float));
    for (long which = 0; which < p->num_blocks; which++) {
        const moesaic_segment *block = &p->blocks[which];
        long rows = block->end - block->start;
        const char *down = (const char *)in->down + block->expert * in->down_expert_stride * 2;
        for (long r = 0; r < rows; r++) weight[r] = in->weight[in->pick[block->start + r]];
        for (long first = d; first < d + n; first += COLUMN_LANES) {
            for (long r = 0; r < rows; r++) {
                y[r] = in->y + in->pick[block->start + r] / in->top_k * in->hidden + first;
                __builtin_prefetch(y[r], 1, 3);
            }
            p->columns->product(down + first * in->down_row_stride * 2, in->down_row_stride * 2,
                                p->h + p->place[which], vectors_of(block), in->width / 2, c, LDC);
            if (in->down_bias)
                p->isa->widen[MOESAIC_BF16](
                    (const uint16_t *)in->down_bias + block->expert * in->down_bias_stride + first, bias, COLUMN_LANES);
            p->columns->add(c, LDC, bias, weight, y, rows);
        }
    }
}

/* Multiples of 16 of which each thread gets `each` tasks or more. */
static long share(long n, long tasks, long each, long threads) {
    long part = n;
    while (part > COLUMN_LANES && parts_of(n, part) * tasks < each * threads) part = parts_of(part / 2, COLUMN_LANES) * COLUMN_LANES;
    return part;
}

long moesaic_experts_forward_columns(const moesaic_experts *in) {
    pass p = {.in = in, .isa = moesaic_isa_now, .columns = moesaic_isa_now->columns};
    long most = in->num_groups + in->row_end[in->num_groups - 1] / LDC + 1;
    moesaic_segment *blocks = malloc((size_t)most * sizeof *blocks);
    long *place = malloc((size_t)(most + 1) * sizeof *place);
    if (!blocks || !place) {
        free(blocks), free(place);
        return -1;
    }
    p.num_blocks = moesaic_cut(in, LDC, blocks);
    place[0] = 0;
    for (long i = 0; i < p.num_blocks; i++) place[i + 1] = place[i] + in->width / 2 * vectors_of(&blocks[i]) * COLUMN_LANES;
    p.blocks = blocks;
    p.place = place;
    p.h = moesaic_allocate(place[p.num_blocks] * (long)sizeof *p.h);
    if (!p.h) {
        free(blocks), free(place);
        return -1;
    }
    p.features = share(in->width, p.num_blocks, 8, in->threads);
    p.outputs = share(in->hidden, 1, 2, in->threads);
    moesaic_parallel(in->threads, p.num_blocks * parts_of(in->width, p.features), up_task, &p);
    if (!p.failed) moesaic_parallel(in->threads, parts_of(in->hidden, p.outputs), down_task, &p);
    free(blocks), free(place), free(p.h);
    return p.failed ? -1 : 0;
}

/* Whether the instruction set in use has these products. */
int moesaic_has_columns(void) { return moesaic_isa_now->columns != 0; }
