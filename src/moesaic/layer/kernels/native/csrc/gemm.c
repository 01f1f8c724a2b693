#include "gemm.h"

#include <string.h>

#include "threads.h"

enum {
    K_MOST = 2 * K_UNITS, /* values along k of a packed panel, bfloat16 comes in pairs; also the most rows of a block */
    LINE = 64,
};
/* The forward pass has slot 0. */
enum { SLOT_A = 1, SLOT_B, SLOT_C, SLOT_WIDE };

typedef struct {
    const moesaic_isa *isa;
    int type, pairs; /* pairs: bfloat16 stays as it is; other 16-bit types are widened before they are packed */
    long size;       /* of an element that is packed */
} format;

/* A block of one operand, ready to be packed. */
typedef struct {
    const char *rows[K_MOST];
    long number, reach; /* rows, elements of each */
} block;

/* Addresses of rows [first, first + count) of the product, or of its k values [k, k + length). */
static void find(const format *f, const moesaic_operand *operand, long first, long count, long k, long length, block *out) {
    long size = moesaic_size_of(f->type), start = operand->first + (operand->along_k ? first : k);
    const char *data = (const char *)operand->data + (operand->offset + (operand->along_k ? k : first)) * size;
    out->number = operand->along_k ? count : length;
    out->reach = operand->along_k ? length : count;
    for (long i = 0; i < out->number; i++) {
        long row = operand->pick ? operand->pick[start + i] / operand->top_k : start + i;
        out->rows[i] = data + row * operand->stride;
    }
}

/* Copies a block into `wide` as float32. */
static void widen(const format *f, block *b, long skip, long reach, float *wide) {
    for (long i = 0; i < b->number; i++) {
        f->isa->widen[f->type](b->rows[i] + skip * moesaic_size_of(f->type), wide + i * reach, reach);
        b->rows[i] = (const char *)(wide + i * reach);
    }
}

/* Fetches rows [from, to) of the next panel of B while tiles compute: rows of a weight are pages apart. */
static void fetch(const block *next, long skip, long bytes, long from, long to) {
    for (long i = from; i < to; i++)
        for (long byte = 0; byte < bytes; byte += LINE) __builtin_prefetch(next->rows[i] + skip + byte, 0, 2);
}

typedef struct {
    long first, count;
} stretch;

/* Which columns of B a panel holds, `each` panels for each set of columns. */
static stretch place(const moesaic_operand *b, long panel, long each, long width, long columns) {
    long first = panel % each * width;
    return (stretch){first + panel / each * b->jump, least(columns - first, width)};
}

/* Packs the rows of A of one tile. Those that run along k stay rows: the tiles read one value of each at a time. */
static void pack_tile(const format *f, const block *a, int along_k, long first, long count, long length, uint32_t *packed) {
    long height = f->isa->outer_rows;
    if (!along_k) f->isa->pack(f->pairs, 0, a->rows, first * f->size, length, count, (int)height, packed);
    else f->isa->copy(a->rows + first, length * f->size, count, packed);
}

/* Asks for what the next tile of A is packed from. */
static void fetch_tile(const format *f, const block *a, int along_k, long first, long count, long length) {
    if (count <= 0) return;
    if (along_k) fetch(a, 0, length * f->size, first, first + count);
    else fetch(a, first * f->size, count * f->size, 0, length);
}

/* Sums of one panel into rows of the type that end within it. */
static void narrow_panel(const format *f, const float *c, long ldc, long rows, long count, char *out, long stride) {
    for (long r = 0; r < rows; r++) f->isa->narrow[f->type](c + r * ldc, out + r * stride, count);
}

/* moesaic_product, or moesaic_product_to if there is `out`. */
static float *product(int type, const moesaic_operand *a, long rows, const moesaic_operand *b, long columns, long k,
                      long *ldc, char *out, long stride) {
    const moesaic_isa *isa = moesaic_isa_now;
    format f = {.isa = isa, .type = type, .pairs = type == MOESAIC_BF16 && isa->dot_bf16};
    int widens = !f.pairs && type != MOESAIC_F32;
    long size = moesaic_size_of(type), height = isa->outer_rows, width = isa->outer_columns;
    long k_block = f.pairs ? K_MOST : K_UNITS;
    f.size = widens ? 4 : size;
    long tiles = (rows + height - 1) / height, each = (columns + width - 1) / width, panels = b->jump ? 2 * each : each;
    *ldc = panels * width;
    uint32_t *packed_a = moesaic_scratch(SLOT_A, tiles * height * PACKED_ROW * 4);
    uint32_t *packed_b = moesaic_scratch(SLOT_B, width * K_UNITS * 4);
    float *c = moesaic_scratch(SLOT_C, tiles * height * *ldc * (long)sizeof(float));
    float *wide = widens ? moesaic_scratch(SLOT_WIDE, (tiles * height + width) * K_UNITS * (long)sizeof(float)) : 0;
    if (!packed_a || !packed_b || !c || (widens && !wide)) return 0;
    if (k == 0) memset(c, 0, (size_t)(tiles * height * *ldc) * sizeof(float));

    block a_block, b_block, panel_block, later;
    if (!b->along_k) find(&f, b, 0, columns, 0, least(k, k_block), &b_block);
    for (long from = 0; from < k; from += k_block) {
        long length = least(k - from, k_block), units = f.pairs ? (length + 1) / 2 : length;
        find(&f, a, 0, rows, from, length, &a_block);
        if (widens) widen(&f, &a_block, 0, a_block.reach, wide);
        long after = least(k - from - length, k_block), tile_of_a = height * (a->along_k ? PACKED_ROW : units);
        if (!b->along_k) find(&f, b, 0, columns, from + length, after, &later);
        for (long panel = 0; panel < panels; panel++) {
            stretch now = place(b, panel, each, width, columns), next = place(b, (panel + 1) % panels, each, width, columns);
            const block *source = &b_block;
            long skip = now.first * size;
            if (b->along_k || widens) {
                float *room = wide + tiles * height * K_UNITS;
                source = &panel_block;
                if (b->along_k) find(&f, b, now.first, now.count, from, length, &panel_block);
                else panel_block = b_block;
                if (widens) widen(&f, &panel_block, b->along_k ? 0 : now.first, b->along_k ? length : now.count, room);
                skip = 0;
            }
            isa->pack(f.pairs, b->along_k, source->rows, skip, length, now.count, (int)width, packed_b);
            int last = panel + 1 == panels, done = out && after == 0;
            long fetched = b->along_k ? 0 : last ? after : length;
            char *to = out + now.first * size;
            moesaic_sums sums = {.ldc = *ldc, .add = from > 0, .stride = stride, .type = type};
            for (long tile = 0; tile < tiles; tile++) {
                long top = tile * height, count = least(rows - top, height), below = top + height;
                if (panel == 0) {
                    pack_tile(&f, &a_block, a->along_k, top, count, length, packed_a + tile * tile_of_a);
                    if (!widens) fetch_tile(&f, &a_block, a->along_k, below, least(rows - below, height), length);
                }
                fetch(last ? &later : &b_block, next.first * size, next.count * size, tile * fetched / tiles,
                      (tile + 1) * fetched / tiles);
                sums.c = c + top * *ldc + panel * width;
                if (done && now.count == width) sums.out = to + top * stride;
                isa->outer[f.pairs][a->along_k](packed_a + tile * tile_of_a, packed_b, (int)count, units, &sums);
            }
            if (done && now.count < width) narrow_panel(&f, c + panel * width, *ldc, rows, now.count, to, stride);
        }
        b_block = later;
    }
    return c;
}

float *moesaic_product(int type, const moesaic_operand *a, long rows, const moesaic_operand *b, long columns, long k,
                       long *ldc) {
    return product(type, a, rows, b, columns, k, ldc, 0, 0);
}

int moesaic_product_to(int type, const moesaic_operand *a, long rows, const moesaic_operand *b, long columns, long k,
                       char *out, long stride) {
    long ldc;
    int done = product(type, a, rows, b, columns, k, &ldc, out, stride) != 0;
#if defined(__x86_64__)
    /* Other threads must see what went past the caches. */
    __builtin_ia32_sfence();
#endif
    return done;
}

/* For tests and measurements: a whole product with one task, c[rows][columns] of float32. */
long moesaic_gemm(int type, const moesaic_operand *a, long rows, const moesaic_operand *b, long columns, long k, float *c) {
    for (long r = 0; r < rows; r += BLOCK_ROWS)
        for (long j = 0; j < columns; j += BLOCK_COLUMNS) {
            moesaic_operand left = *a, right = *b;
            if (a->along_k) left.first += r;
            else left.offset += r;
            if (b->along_k) right.first += j;
            else right.offset += j;
            long ldc, height = least(rows - r, BLOCK_ROWS), width = least(columns - j, BLOCK_COLUMNS);
            const float *block = moesaic_product(type, &left, height, &right, width, k, &ldc);
            if (!block) return -1;
            for (long i = 0; i < height; i++)
                memcpy(c + (r + i) * columns + j, block + i * ldc, (size_t)width * sizeof(float));
        }
    return 0;
}
