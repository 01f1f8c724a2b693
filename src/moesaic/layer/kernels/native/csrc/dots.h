/* Products of rows of x with rows of a weight, in tiles that respect the caches. */
#ifndef MOESAIC_DOTS_H
#define MOESAIC_DOTS_H

#include "isa.h"

enum {
    /* Most rows of one call, whatever their length. */
    ROWS_MOST = 192,
};

/* Rows of x, ready for any number of products. */
typedef struct {
    const void *row[ROWS_MOST];
    long rows, k, k_block;
    const char *packed; /* k blocks of all rows one after the other, or NULL: rows as they are */
    int type;           /* float32, or bfloat16 for weights of that type where the instruction set has it */
} moesaic_rows;

/* The type in which x meets weights of a type. */
static inline int moesaic_type_of_x(const moesaic_isa *isa, int type) {
    return type == MOESAIC_BF16 && isa->dot_bf16 ? MOESAIC_BF16 : MOESAIC_F32;
}

/* How many rows of `k` elements one call should have, so that they stay in the second-level cache. */
long moesaic_rows_at_once(long k, int x_type);

/* Completes a structure whose row, rows, k and type are set. Uses scratch memory: one at a time for each thread. */
void moesaic_rows_prepare(moesaic_rows *x);

/* c[r * ldc + o] += dot(x row r, w row o) for o < out; rows of w are `stride` bytes apart and have the given type.
 * `after` is what will be needed next, or NULL. */
void moesaic_dots(const moesaic_isa *isa, int type, const moesaic_rows *x, const char *w, long stride, long out,
                  const char *after, float *c, long ldc);

#endif
