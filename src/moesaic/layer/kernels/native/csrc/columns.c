/* Forward pass of packed experts by the products of columns.h. Weights are stored (out, in), and hidden and width are
 * multiples of 16. */
#include "columns.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "experts.h"
#include "isa.h"
#include "memory.h"
#include "packed.h"
#include "threads.h"

enum {
    LDC = COLUMN_LANES * COLUMN_VECTORS,
    WIDE = 2 * COLUMN_LANES, /* features that are finished together: in bfloat16 they are a line of the cache */
    TAIL = 6, /* most rows of a block that are left over from whole vectors and cost less as dot products */
    SLOT_SUMS = 0,
    SLOT_X = 1,
};

typedef struct {
    const moesaic_experts *in;
    const moesaic_isa *isa;
    const moesaic_column_products *columns;
    const moesaic_segment *blocks;
    const long *place; /* of each block in h, in pairs */
    long num_blocks;
    uint32_t *h;
    long features, outputs; /* of one task */
    atomic_int failed;
} pass;

/* Rows that are computed as dot products: few that would leave most of a vector empty. */
static inline long tail_of(const moesaic_segment *block) {
    long left = (block->end - block->start) % COLUMN_LANES;
    return left <= TAIL ? left : 0;
}

static inline int vectors_of(const moesaic_segment *block) {
    return (int)((block->end - block->start - tail_of(block) + COLUMN_LANES - 1) / COLUMN_LANES);
}

/* Pairs of a block's h: [width / 2][16 * vectors], then the rows of its tail. */
static inline long pairs_of(const moesaic_segment *block, long width) {
    return width / 2 * (vectors_of(block) * COLUMN_LANES + tail_of(block));
}

/* c[r * 16 + o] = dot(x row r, w row o) for o < 16: the tail's products, with weights that are in the cache by now. */
static void tail_product(const moesaic_isa *isa, const void *const *x, long rows, const char *w, long stride, long k, float *c) {
    memset(c, 0, (size_t)(rows * COLUMN_LANES) * sizeof *c);
    for (long o = 0; o < COLUMN_LANES; o += TILE_OUT) {
        const void *weight[TILE_OUT];
        for (long i = 0; i < TILE_OUT; i++) weight[i] = w + (o + i) * stride;
        isa->dot[MOESAIC_BF16](x, weight, (int)rows, TILE_OUT, k, c + o, COLUMN_LANES);
    }
}

static float one(const pass *p, const void *from, long place) {
    float value;
    p->isa->widen[MOESAIC_BF16]((const uint16_t *)from + place, &value, 1);
    return value;
}

/* Which row of the first projection gives gate (half 0) or up (half 1) of a feature. */
static inline long row_of(const moesaic_experts *in, long half, long feature) {
    return in->interleaved ? 2 * feature + half : half * in->width + feature;
}

/* Whole vectors of one block: bias, copy of the sums, activation, pairs of h. c holds `wide` features, WIDE at most, of gate,
 * of up and of h. */
static void finish_vectors(const pass *p, const moesaic_segment *block, long first, long wide, long lanes, uint32_t *h,
                           float *c) {
    const moesaic_experts *in = p->in;
    long halves = in->gated ? 2 : 1, rows = least(block->end - block->start, lanes);
    float *value = c + 2 * WIDE * LDC;
    for (long half = 0; half < halves; half++) {
        float *sums = c + half * WIDE * LDC;
        if (in->up_bias)
            for (long o = 0; o < wide; o++) {
                float bias = one(p, in->up_bias, block->expert * in->up_bias_stride + row_of(in, half, first + o));
                for (long i = 0; i < lanes; i++) sums[o * LDC + i] += bias;
            }
        uint16_t *saved = (uint16_t *)in->saved_up + block->start * halves * in->width;
        if (in->saved_up && !in->interleaved)
            p->columns->save(sums, LDC, saved + row_of(in, half, first), halves * in->width, rows, wide);
        else if (in->saved_up)
            for (long r = 0; r < rows; r++)
                for (long o = 0; o < wide; o++)
                    p->isa->narrow[MOESAIC_BF16](sums + o * LDC + r,
                                                 saved + r * halves * in->width + row_of(in, half, first + o), 1);
    }
    for (long o = 0; o < wide; o++)
        p->isa->activate(in->activation, in->alpha, in->limit, c + o * LDC,
                         in->gated ? c + (WIDE + o) * LDC : NULL, value + o * LDC, lanes);
    for (long o = 0; o < wide; o += 2)
        p->columns->pair(value + o * LDC, value + (o + 1) * LDC, h + (first + o) / 2 * lanes, lanes);
}

/* The same for the tail: c[half][row][16]. */
static void finish_tail(const pass *p, const moesaic_segment *block, long first, long rows, uint16_t *h, float *c) {
    const moesaic_experts *in = p->in;
    long halves = in->gated ? 2 : 1, start = block->end - rows;
    float value[COLUMN_LANES];
    for (long r = 0; r < rows; r++) {
        for (long half = 0; half < halves; half++) {
            float *sums = c + (half * TAIL + r) * COLUMN_LANES;
            for (long o = 0; o < COLUMN_LANES; o++) {
                long row = row_of(in, half, first + o);
                if (in->up_bias) sums[o] += one(p, in->up_bias, block->expert * in->up_bias_stride + row);
                if (in->saved_up && in->interleaved)
                    p->isa->narrow[MOESAIC_BF16](
                        sums + o, (uint16_t *)in->saved_up + (start + r) * halves * in->width + row, 1);
            }
            if (in->saved_up && !in->interleaved)
                p->isa->narrow[MOESAIC_BF16](
                    sums, (uint16_t *)in->saved_up + (start + r) * halves * in->width + row_of(in, half, first), COLUMN_LANES);
        }
        p->isa->activate(in->activation, in->alpha, in->limit, c + r * COLUMN_LANES,
                         in->gated ? c + (TAIL + r) * COLUMN_LANES : NULL, value, COLUMN_LANES);
        p->isa->narrow[MOESAIC_BF16](value, h + r * in->width + first, COLUMN_LANES);
    }
}

/* The first projection and the activation for one block and some features. */
static void up_task(void *context, long task, int worker) {
    (void)worker;
    pass *p = context;
    const moesaic_experts *in = p->in;
    long chunks = parts_of(in->width, p->features), f = task % chunks * p->features, n = least(in->width - f, p->features);
    long which = task / chunks;
    const moesaic_segment *block = &p->blocks[which];
    int vectors = vectors_of(block);
    long lanes = (long)vectors * COLUMN_LANES, pairs = in->hidden / 2, tail = tail_of(block);
    long rows = block->end - block->start - tail;
    uint32_t *x = moesaic_scratch(SLOT_X, (pairs * lanes + 1) * (long)sizeof *x);
    float *c = moesaic_scratch(SLOT_SUMS, 3 * WIDE * LDC * (long)sizeof *c);
    if (!x || !c) {
        p->failed = 1;
        return;
    }
    const char *row[LDC + TAIL];
    for (long r = 0; r < rows + tail; r++)
        row[r] = (const char *)in->x + in->pick[block->start + r] / in->top_k * in->x_stride * 2;
    if (vectors) p->isa->pack(1, 1, row, 0, in->hidden, rows, (int)lanes, x);

    long stride = in->up_row_stride * 2, step = in->interleaved ? 2 * stride : stride;
    const char *up = (const char *)in->up + block->expert * in->up_expert_stride * 2;
    uint32_t *h = p->h + p->place[which];
    float left[2 * TAIL * COLUMN_LANES];
    for (long first = f, wide; first < f + n; first += wide) {
        wide = least(f + n - first, WIDE);
        for (long o = 0; vectors && o < wide; o += COLUMN_LANES)
            for (long half = 0; half < (in->gated ? 2 : 1); half++)
                p->columns->product(up + row_of(in, half, first + o) * stride, step, x, vectors, pairs,
                                    c + (half * WIDE + o) * LDC, LDC);
        if (vectors) finish_vectors(p, block, first, wide, lanes, h, c);
        for (long o = 0; tail && o < wide; o += COLUMN_LANES) {
            for (long half = 0; half < (in->gated ? 2 : 1); half++)
                tail_product(p->isa, (const void *const *)row + rows, tail, up + row_of(in, half, first + o) * stride, step,
                             in->hidden, left + half * TAIL * COLUMN_LANES);
            finish_tail(p, block, first + o, tail, (uint16_t *)(h + in->width / 2 * lanes), left);
        }
    }
}

/* The second projection for some outputs of every row. A task owns its columns of y. */
static void down_task(void *context, long task, int worker) {
    (void)worker;
    pass *p = context;
    const moesaic_experts *in = p->in;
    long d = task * p->outputs, n = least(in->hidden - d, p->outputs);
    float c[COLUMN_LANES * LDC], left[TAIL * COLUMN_LANES], bias[COLUMN_LANES] = {0}, weight[LDC + TAIL], *y[LDC + TAIL];
    for (long t = 0; t < in->tokens; t++) memset(in->y + t * in->hidden + d, 0, (size_t)n * sizeof(float));
    for (long which = 0; which < p->num_blocks; which++) {
        const moesaic_segment *block = &p->blocks[which];
        int vectors = vectors_of(block);
        long tail = tail_of(block), rows = block->end - block->start - tail, stride = in->down_row_stride * 2;
        const char *down = (const char *)in->down + block->expert * in->down_expert_stride * 2;
        const uint32_t *h = p->h + p->place[which];
        const uint16_t *h_tail = (const uint16_t *)(h + in->width / 2 * vectors * COLUMN_LANES);
        const void *x[TAIL];
        for (long r = 0; r < tail; r++) x[r] = h_tail + r * in->width;
        for (long r = 0; r < rows + tail; r++) weight[r] = in->weight[in->pick[block->start + r]];
        for (long first = d; first < d + n; first += COLUMN_LANES) {
            for (long r = 0; r < rows + tail; r++) {
                y[r] = in->y + in->pick[block->start + r] / in->top_k * in->hidden + first;
                __builtin_prefetch(y[r], 1, 3);
            }
            if (in->down_bias)
                p->isa->widen[MOESAIC_BF16](
                    (const uint16_t *)in->down_bias + block->expert * in->down_bias_stride + first, bias, COLUMN_LANES);
            if (vectors) {
                p->columns->product(down + first * stride, stride, h, vectors, in->width / 2, c, LDC);
                p->columns->add(c, LDC, bias, weight, y, rows);
            }
            if (tail) tail_product(p->isa, x, tail, down + first * stride, stride, in->width, left);
            for (long r = 0; r < tail; r++) {
                p->isa->axpy(1.0f, bias, left + r * COLUMN_LANES, COLUMN_LANES);
                p->isa->axpy(weight[rows + r], left + r * COLUMN_LANES, y[rows + r], COLUMN_LANES);
            }
        }
    }
}

/* Cuts each expert's rows into blocks of whole vectors, as even as can be; the last takes the tail. Returns how many. */
static long cut(const moesaic_experts *in, moesaic_segment *blocks) {
    long start = 0, count = 0;
    for (long group = 0; group < in->num_groups; group++) {
        moesaic_segment all = {in->expert[group], start, in->row_end[group]};
        long vectors = (all.end - all.start - tail_of(&all) + COLUMN_LANES - 1) / COLUMN_LANES;
        long parts = parts_of(vectors, COLUMN_VECTORS);
        if (parts == 0) parts = 1;
        for (long part = 0; part < parts; part++) {
            long end = part + 1 < parts ? all.start + vectors * (part + 1) / parts * COLUMN_LANES : all.end;
            blocks[count++] = (moesaic_segment){all.expert, start, end};
            start = end;
        }
    }
    return count;
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
    p.num_blocks = cut(in, blocks);
    place[0] = 0;
    for (long i = 0; i < p.num_blocks; i++) place[i + 1] = place[i] + pairs_of(&blocks[i], in->width);
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
