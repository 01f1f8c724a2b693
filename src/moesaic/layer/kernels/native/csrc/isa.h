/* What one instruction set offers. Everything that depends on vector instructions goes through this table, which is
 * chosen once, when the library is loaded; the rest of the code is plain C. */
#ifndef MOESAIC_ISA_H
#define MOESAIC_ISA_H

#include <stdint.h>

#include "columns.h"

enum { MOESAIC_F32 = 0, MOESAIC_BF16 = 1, MOESAIC_F16 = 2 };

/* Register tile of the dot-product kernel: rows of x times rows of a weight. */
enum { TILE_ROWS = 6, TILE_OUT = 4 };

/* Most rows of a product that streams weights: their sums stay in the first-level cache. */
enum { STREAM_MOST = 16 };

/* Rows of a weight that are asked for while another tile is computed, and the most rows of x for which a weight streams
 * through once, so that memory sets the time. */
enum { AHEAD = 2, STREAM_ROWS = 4 };

/* What happens between the two projections. */
enum {
    ACT_SILU = 0,
    ACT_GELU = 1,
    ACT_GELU_TANH = 2,
    ACT_RELU = 3,
    ACT_RELU2 = 4,
    ACT_CLAMPED_SWIGLU = 5,
};

/* Elements of 32 bits from one packed row to the next: K_UNITS, and a line so that rows don't share their places in the
 * cache. */
enum { K_UNITS = 256, PACKED_ROW = K_UNITS + 16 };

/* Where the sums of a tile go. */
typedef struct {
    float *c; /* rows `ldc` apart; up to outer_rows are written */
    long ldc;
    int add;  /* to what c holds */
    char *out; /* if not NULL, the sums are not kept in c: they go here, rounded to the type, rows `stride` bytes apart */
    long stride;
    int type;
} moesaic_sums;

typedef struct {
    const char *name;
    int available;

    /* c[r * ldc + o] += dot(x[r], w[o]) over `k` elements, for r < rows <= TILE_ROWS and o < out <= TILE_OUT. Weights
     * have the given type. x is float32, except that bfloat16 weights meet bfloat16 x where `dot_bf16` is set. */
    void (*dot[3])(const void *const *x, const void *const *w, int rows, int out, long k, float *c, long ldc);
    /* The same, asking for as many bytes from each `ahead` as one row of w has. */
    void (*dot_ahead[3])(const void *const *x, const void *const *w, int rows, int out, long k, const void *const *ahead,
                         float *c, long ldc);
    /* The same for rows <= STREAM_ROWS and any number of rows of w, `stride` bytes apart. */
    void (*dot_stream[3])(const void *const *x, const char *w, long stride, int rows, long out, long k, float *c, long ldc);
    int dot_bf16;

    /* Conversion from and to float32. */
    void (*widen[3])(const void *from, float *to, long n);
    void (*narrow[3])(const float *from, void *to, long n);

    /* Tile of a product of packed panels: sums over i < k of a[i][r] b[i][j], for r < rows <= outer_rows and all
     * outer_columns. With [][1] A is a[r][i] with rows PACKED_ROW elements apart. Elements are float32, or with [1] pairs of
     * bfloat16 that are neighbours along k, where `dot_bf16` is set. */
    int outer_rows, outer_columns;
    void (*outer[2][2])(const uint32_t *a, const uint32_t *b, int rows, long k, const moesaic_sums *to);

    /* packed[i][width] for k elements of 16 bits (`pairs`) or 32: either from `count` rows that run along k, or from one
     * row for each k that begins `skip` bytes behind its address. Columns from `count` on are zero. */
    void (*pack)(int pairs, int along_k, const char *const *rows, long skip, long k, long count, int width,
                 uint32_t *packed);

    /* Copies of `bytes` of each row, PACKED_ROW elements of 32 bits apart, filled up with zeros to a whole element. */
    void (*copy)(const char *const *rows, long bytes, long count, uint32_t *packed);

    /* c[r][j] += sum over i < k of x[r][i] w[i * stride + j], for r < rows <= STREAM_MOST and j < n; rows of c are `ldc`
     * apart. Weights have the given type. */
    void (*stream[3])(const float *const *x, int rows, const void *w, long stride, long k, float *c, long ldc, long n);

    /* Products with rows of x as columns, or NULL. */
    const moesaic_column_products *columns;

    /* y += a * x. */
    void (*axpy)(float a, const float *x, float *y, long n);

    /* a = exp(a - most), and the sum of that. */
    float (*exp_sum)(float *a, float most, long n);

    /* y[r] = sum over s < n of p[r * ldp + s] * v[s], for r < rows; v has rows of `width` elements of the type. */
    void (*mix[3])(const float *p, long ldp, long rows, const void *v, long v_stride, long n, float *y, long width);

    /* h = act(gate) * up, or act(gate) if up is NULL. */
    void (*activate)(int activation, float alpha, float limit, const float *gate, const float *up, float *h, long n);

    /* Of h = act(gate, up) and the gradient by h: replaces gate and up (may be NULL) by weight times their gradients,
     * writes weight * h, and returns the dot product of h and its gradient. */
    float (*activate_backward)(int activation, float alpha, float limit, float weight, const float *h_grad, float *gate,
                               float *up, float *h, long n);
} moesaic_isa;

/* The best instruction set of this machine, or the one named by moesaic_choose_isa. */
extern const moesaic_isa *moesaic_isa_now;

static inline long moesaic_size_of(int type) { return type == MOESAIC_F32 ? 4 : 2; }

#endif
