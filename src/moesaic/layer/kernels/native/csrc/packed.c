/* Forward pass of packed experts by packed products: for weights that are stored (in, out), and for many rows of each
 * expert, where packing both operands costs less than the dot products in place lose. */
#include "packed.h"

#include <stdlib.h>
#include <string.h>

#include "memory.h"
#include "threads.h"

typedef struct {
    const moesaic_experts *in;
    const moesaic_isa *isa;
    const moesaic_segment *blocks;
    long num_blocks, size, halves, features, columns; /* features and columns of one task */
    char *h;
    int failed;
} pass;

enum { SLOT_VALUES = 5 };

/* The first projection and the activation for one block of rows and some features. */
static void up_task(void *context, long task, int worker) {
    (void)worker;
    pass *p = context;
    const moesaic_experts *in = p->in;
    const moesaic_isa *isa = p->isa;
    long chunks = parts_of(in->width, p->features), f = task % chunks * p->features, n = least(in->width - f, p->features);
    const moesaic_segment *block = &p->blocks[task / chunks];
    int split = in->gated && !in->interleaved;
    long columns = in->interleaved ? 2 * n : n, ldc;
    moesaic_operand a = moesaic_picked(in, in->x, in->x_stride, block->start, 1);
    moesaic_operand b = moesaic_outputs(in, in->up, in->up_expert_stride, in->up_row_stride, block->expert,
                                        in->up_transposed, in->interleaved ? 2 * f : f);
    if (split) b.jump = in->width;
    float *c = moesaic_product(in->type, &a, block->end - block->start, &b, columns, in->hidden, &ldc);
    float *values = moesaic_scratch(SLOT_VALUES, 5 * BLOCK_COLUMNS * (long)sizeof(float));
    if (!c || !values) {
        p->failed = 1;
        return;
    }
    float *gates = values, *ups = gates + BLOCK_COLUMNS, *h = ups + BLOCK_COLUMNS;
    float *biases[2] = {h + BLOCK_COLUMNS, h + 2 * BLOCK_COLUMNS};
    long from[2] = {in->interleaved ? 2 * f : f, in->width + f}, sets = split ? 2 : 1, up_width = p->halves * in->width;
    if (in->up_bias)
        for (long set = 0; set < sets; set++) {
            const char *row = (const char *)in->up_bias + (block->expert * in->up_bias_stride + from[set]) * p->size;
            isa->widen[in->type](row, biases[set], columns);
        }
    for (long row = block->start; row < block->end; row++, c += ldc) {
        float *gate = c, *up = in->gated ? c + ldc / 2 : 0;
        for (long set = 0; set < sets; set++) {
            float *sums = set ? up : gate;
            if (in->up_bias) isa->axpy(1.0f, biases[set], sums, columns);
            if (in->saved_up)
                isa->narrow[in->type](sums, (char *)in->saved_up + (row * up_width + from[set]) * p->size, columns);
        }
        if (in->interleaved) {
            for (long i = 0; i < n; i++) gates[i] = c[2 * i], ups[i] = c[2 * i + 1];
            gate = gates, up = ups;
        }
        isa->activate(in->activation, in->alpha, in->limit, gate, up, h, n);
        isa->narrow[in->type](h, p->h + (row * in->width + f) * p->size, n);
    }
}

/* The second projection for some outputs of every row, added to the tokens in the order of the experts. A task owns its
 * columns of y, so the sums need no lock and never depend on the number of threads. */
static void down_task(void *context, long task, int worker) {
    (void)worker;
    pass *p = context;
    const moesaic_experts *in = p->in;
    long d = task * p->columns, n = least(in->hidden - d, p->columns);
    float *bias = moesaic_scratch(SLOT_VALUES, 5 * BLOCK_COLUMNS * (long)sizeof(float));
    for (long t = 0; t < in->tokens; t++) memset(in->y + t * in->hidden + d, 0, (size_t)n * sizeof(float));
    for (const moesaic_segment *block = p->blocks; block < p->blocks + p->num_blocks; block++) {
        long ldc;
        moesaic_operand a = moesaic_plain(in, p->h, in->width, block->start, 1, 0);
        moesaic_operand b = moesaic_outputs(in, in->down, in->down_expert_stride, in->down_row_stride, block->expert,
                                            in->down_transposed, d);
        float *c = moesaic_product(in->type, &a, block->end - block->start, &b, n, in->width, &ldc);
        if (!c || !bias) {
            p->failed = 1;
            return;
        }
        if (in->down_bias) {
            const char *row = (const char *)in->down_bias + (block->expert * in->down_bias_stride + d) * p->size;
            p->isa->widen[in->type](row, bias, n);
        }
        for (long row = block->start; row < block->end; row++, c += ldc) {
            long pick = in->pick[row];
            if (in->down_bias) p->isa->axpy(1.0f, bias, c, n);
            p->isa->axpy(in->weight[pick], c, in->y + pick / in->top_k * in->hidden + d, n);
        }
    }
}

long moesaic_experts_forward_packed(const moesaic_experts *in) {
    pass p = {.in = in, .isa = moesaic_isa_now, .size = moesaic_size_of(in->type), .halves = in->gated ? 2 : 1};
    p.features = BLOCK_COLUMNS / p.halves;
    p.columns = moesaic_columns(in, p.isa);
    moesaic_segment *blocks = malloc((size_t)moesaic_blocks_most(in) * sizeof *blocks);
    p.h = moesaic_allocate(in->row_end[in->num_groups - 1] * in->width * p.size);
    p.failed = !blocks || !p.h;
    if (!p.failed) {
        p.num_blocks = moesaic_cut(in, BLOCK_ROWS, blocks);
        p.blocks = blocks;
        moesaic_parallel((int)in->threads, p.num_blocks * parts_of(in->width, p.features), up_task, &p);
        moesaic_parallel((int)in->threads, parts_of(in->hidden, p.columns), down_task, &p);
    }
    free(blocks), free(p.h);
    return p.failed ? -1 : 0;
}
