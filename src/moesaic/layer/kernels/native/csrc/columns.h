/* Products with rows of x as columns: x is packed so that a vector holds one pair of inputs of 16 rows, and weights are
 * read in place, pair by pair. For a middle number of rows, for which packing weights or adding up vectors of dot
 * products would cost too much. bfloat16 only. */
#ifndef MOESAIC_COLUMNS_H
#define MOESAIC_COLUMNS_H

#include <stdint.h>

enum {
    COLUMN_LANES = 16,  /* rows of x in one vector */
    COLUMN_VECTORS = 4, /* most vectors of one block */
};

typedef struct {
    /* c[o * ldc + r] = dot(x row r, w row o) for o < 16 and r < 16 * vectors; x[i][16 * vectors] are `pairs` pairs, and rows
     * of w are `stride` bytes apart. */
    void (*product)(const char *w, long stride, const uint32_t *x, int vectors, long pairs, float *c, long ldc);
    /* to[i] = the pair (a[i], b[i]) in bfloat16. */
    void (*pair)(const float *a, const float *b, uint32_t *to, long n);
    /* y[r][o] += weight[r] * (c[o * ldc + r] + bias[o]) for o < 16 and r < rows. */
    void (*add)(const float *c, long ldc, const float *bias, const float *weight, float *const *y, long rows);
    /* to[r * stride + o] = c[o * ldc + r] in bfloat16 for o < wide, which is 16 or 32, and r < rows. */
    void (*save)(const float *c, long ldc, uint16_t *to, long stride, long rows, long wide);
} moesaic_column_products;

#endif
