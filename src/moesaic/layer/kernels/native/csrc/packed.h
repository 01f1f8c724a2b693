/* What the passes over packed products share: blocks of rows, and rows and weights as operands. */
#ifndef MOESAIC_PACKED_H
#define MOESAIC_PACKED_H

#include "experts.h"
#include "gemm.h"
#include "isa.h"

typedef struct {
    long expert, start, end;
} moesaic_segment;

/* Most blocks that a call's rows make. */
static inline long moesaic_blocks_most(const moesaic_experts *e) {
    return e->num_groups + (e->num_groups ? e->row_end[e->num_groups - 1] : 0) / BLOCK_ROWS + 1;
}

/* Cuts each expert's rows into blocks of at most `most`; returns how many. */
static inline long moesaic_cut(const moesaic_experts *e, long most, moesaic_segment *blocks) {
    long start = 0, count = 0;
    for (long group = 0; group < e->num_groups; group++) {
        /* Blocks of equal height: a last block of one row would read all weights for it. */
        long end = e->row_end[group], parts = parts_of(end - start, most);
        for (long part = 0; part < parts; part++)
            blocks[count++] = (moesaic_segment){e->expert[group], start + (end - start) * part / parts,
                                                start + (end - start) * (part + 1) / parts};
        start = end;
    }
    return count;
}

/* Columns of one task where tasks own columns of all rows: two tasks for each thread. */
static inline long moesaic_columns(const moesaic_experts *e, const moesaic_isa *isa) {
    long width = isa->outer_columns;
    return least(parts_of(parts_of(e->hidden, 2 * e->threads), width) * width, BLOCK_COLUMNS);
}

/* Rows in expert order, from row `first` on. */
static inline moesaic_operand moesaic_plain(const moesaic_experts *e, const void *data, long stride, long first, int along_k,
                                            long offset) {
    return (moesaic_operand){.data = data, .stride = stride * moesaic_size_of(e->type), .first = first, .offset = offset,
                             .along_k = along_k};
}

/* Rows of the tokens that were picked, in expert order. */
static inline moesaic_operand moesaic_picked(const moesaic_experts *e, const void *data, long stride, long first,
                                             int along_k) {
    moesaic_operand rows = moesaic_plain(e, data, stride, first, along_k, 0);
    rows.pick = e->pick;
    rows.top_k = e->top_k;
    return rows;
}

/* Right operands, columns from `column` on: a weight of the forward product, whose columns are the weight's outputs ... */
static inline moesaic_operand moesaic_outputs(const moesaic_experts *e, const void *data, long expert_stride, long stride,
                                              long expert, int transposed, long column) {
    const char *start = (const char *)data + expert * expert_stride * moesaic_size_of(e->type);
    return moesaic_plain(e, start, stride, transposed ? 0 : column, !transposed, transposed ? column : 0);
}
/* ... or of the backward product, whose columns are the weight's inputs. */
static inline moesaic_operand moesaic_inputs(const moesaic_experts *e, const void *data, long expert_stride, long stride,
                                             long expert, int transposed, long column) {
    return moesaic_outputs(e, data, expert_stride, stride, expert, !transposed, column);
}

#endif
