#include "dots.h"

#include <string.h>

#include "threads.h"

enum {
    PANEL = 12,              /* rows of a weight that stay in the first-level cache while rows of x pass by, */
    K_BLOCK = 2048,          /* as so many bytes of each */
    ROWS_BYTES = 384 * 1024, /* rows of x that stay in the second-level cache while weights pass by */
    SLOT_ROWS = 1,
};

static inline long least(long a, long b) { return a < b ? a : b; }

long moesaic_rows_at_once(long k, int x_type) {
    long rows = ROWS_BYTES / (k * moesaic_size_of(x_type)) / TILE_ROWS * TILE_ROWS;
    return rows < TILE_ROWS ? TILE_ROWS : least(rows, ROWS_MOST);
}

/* Rows that are not next to each other are copied: a multiple of 4096 bytes apart, as they often are, they would push
 * each other out of the cache. */
void moesaic_rows_prepare(moesaic_rows *x) {
    long size = moesaic_size_of(x->type);
    x->packed = 0;
    x->k_block = x->rows > TILE_ROWS ? K_BLOCK / size : x->k;
    if (x->rows <= TILE_ROWS) return;
    int apart = x->k > x->k_block;
    for (long r = 1; r < x->rows && !apart; r++)
        apart = (const char *)x->row[r] != (const char *)x->row[r - 1] + x->k * size;
    char *packed = apart ? moesaic_scratch(SLOT_ROWS, x->rows * x->k * size) : 0;
    if (!packed) return;
    for (long first = 0; first < x->k; first += x->k_block) {
        long length = least(x->k - first, x->k_block);
        for (long r = 0; r < x->rows; r++)
            memcpy(packed + (first * x->rows + r * length) * size, (const char *)x->row[r] + first * size,
                   (size_t)(length * size));
    }
    x->packed = packed;
}

static const void *part_of(const moesaic_rows *x, long r, long first, long length) {
    long size = moesaic_size_of(x->type);
    if (x->packed) return x->packed + (first * x->rows + r * length) * size;
    return (const char *)x->row[r] + first * size;
}

void moesaic_dots(const moesaic_isa *isa, int type, const moesaic_rows *x, const char *w, long stride, long out,
                  const char *after, float *c, long ldc) {
    if (x->rows <= STREAM_ROWS) {
        isa->dot_stream[type](x->row, w, stride, (int)x->rows, out, x->k, c, ldc);
        return;
    }
    long w_size = moesaic_size_of(type);
    for (long panel = 0; panel < out; panel += PANEL) {
        long panel_end = least(panel + PANEL, out);
        for (long first = 0; first < x->k; first += x->k_block) {
            long length = least(x->k - first, x->k_block);
            const char *part = w + first * w_size, *next = part + length * w_size;
            long left = PANEL;
            if (first + length == x->k) {
                next = panel_end < out ? w + panel_end * stride : after;
                if (panel_end < out) left = least(PANEL, out - panel_end);
            }
            if (!next) left = 0;
            for (long r = 0; r < x->rows; r += TILE_ROWS) {
                int count = (int)least(x->rows - r, TILE_ROWS);
                const void *rows[TILE_ROWS];
                for (int i = 0; i < count; i++) rows[i] = part_of(x, r + i, first, length);
                for (long o = panel; o < panel_end; o += TILE_OUT) {
                    const void *weight[TILE_OUT], *ahead[AHEAD];
                    for (int i = 0; i < TILE_OUT; i++) weight[i] = part + (o + i) * stride;
                    for (int i = 0; i < AHEAD; i++) {
                        ahead[i] = left > 0 ? next : weight[0];
                        if (left > 0) next += stride, left--;
                    }
                    isa->dot_ahead[type](rows, weight, count, (int)least(panel_end - o, TILE_OUT), length, ahead,
                                         c + r * ldc + o, ldc);
                }
            }
        }
    }
}
