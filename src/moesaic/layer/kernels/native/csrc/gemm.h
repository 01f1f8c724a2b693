/* Products of two matrices given by rows, packed block by block: for operands whose rows run across the sum, where dot
 * products in place are impossible, and for float32 with many rows, where packing pays. */
#ifndef MOESAIC_GEMM_H
#define MOESAIC_GEMM_H

#include <stdint.h>

#include "isa.h"

/* Largest block of a product: its packed operands and sums stay in the second-level cache. */
enum { BLOCK_ROWS = 288, BLOCK_COLUMNS = 512 };

static inline long least(long a, long b) { return a < b ? a : b; }
static inline long parts_of(long n, long part) { return (n + part - 1) / part; }

/* One operand. Row i stands at `data + row * stride`, where row is i, or pick[i] / top_k if there are picks. */
typedef struct {
    const void *data;
    long stride; /* in bytes */
    const int64_t *pick;
    long top_k;
    long first;  /* row where the product's first row or first k stands */
    long offset; /* element of each row where the product begins */
    long jump;   /* if not 0, there is a second set of columns this far behind the first; both are computed */
    int along_k; /* rows run along k: the operand's rows are the product's. Otherwise there is one row for each k */
} moesaic_operand;

/* c[i * ldc + j] = sum over k of a(i, k) b(k, j) in float32, for i < rows <= BLOCK_ROWS, j < columns <= BLOCK_COLUMNS.
 * With two sets of columns, those of the second are at c[i * ldc + ldc / 2 + j]. c is scratch memory of the calling
 * thread with rows of `*ldc` elements; NULL without memory. Sums don't depend on how the whole was cut into blocks. */
float *moesaic_product(int type, const moesaic_operand *a, long rows, const moesaic_operand *b, long columns, long k,
                       long *ldc);

/* The same sums, k > 0, rounded into rows of `out` that are `stride` bytes apart; 0 without memory. */
int moesaic_product_to(int type, const moesaic_operand *a, long rows, const moesaic_operand *b, long columns, long k,
                       char *out, long stride);

#endif
