/* Forward pass of packed experts whose weights are stored (out, in): each output is a dot product of two rows that are
 * contiguous in memory, so neither operand is copied or repacked, for one row or for thousands. */
#include "experts.h"

#include <stdlib.h>
#include <string.h>

#include "isa.h"
#include "threads.h"

enum {
    CHUNK = 64,              /* outputs of one task */
    K_BLOCK = 4096,          /* bytes of a row that one tile runs over: 10 rows of it stay in the first-level cache */
    ROWS_BYTES = 256 * 1024, /* rows of x that are held in the second-level cache while weights pass by */
};

typedef struct {
    long expert, start, end;
} segment;

typedef struct {
    const moesaic_experts *in;
    const moesaic_isa *isa;
    const segment *blocks;
    long num_blocks;
    const char *x;       /* rows as the dot product wants them */
    long x_stride;       /* in bytes */
    char *h;
    long h_stride;       /* in bytes */
    int x_type;
    long down_chunk;     /* outputs of one task of the second projection */
} pass;

/* c[rows][ldc] += x . w over whole rows, in tiles that respect the caches. */
static void dots(const moesaic_isa *isa, int type, int x_type, const void *const *x, long rows, const void *const *w,
                 long out, long k, float *c, long ldc) {
    long x_size = moesaic_size_of(x_type), w_size = moesaic_size_of(type), k_block = K_BLOCK / x_size;
    for (long o = 0; o < out; o += TILE_OUT) {
        int outs = (int)(out - o < TILE_OUT ? out - o : TILE_OUT);
        for (long first = 0; first < k; first += k_block) {
            long length = k - first < k_block ? k - first : k_block;
            const void *w_part[TILE_OUT];
            for (int i = 0; i < outs; i++) w_part[i] = (const char *)w[o + i] + first * w_size;
            for (long r = 0; r < rows; r += TILE_ROWS) {
                int count = (int)(rows - r < TILE_ROWS ? rows - r : TILE_ROWS);
                const void *x_part[TILE_ROWS];
                for (int i = 0; i < count; i++) x_part[i] = (const char *)x[r + i] + first * x_size;
                isa->dot[type](x_part, w_part, count, outs, length, c + r * ldc + o, ldc);
            }
        }
    }
}

/* The first projection and the activation for one block of rows and up to CHUNK features. */
static void up_task(void *context, long task, int worker) {
    (void)worker;
    const pass *p = context;
    const moesaic_experts *in = p->in;
    const moesaic_isa *isa = p->isa;
    long chunks = (in->width + CHUNK - 1) / CHUNK;
    const segment *block = &p->blocks[task / chunks];
    long f = task % chunks * CHUNK;
    long features = in->width - f < CHUNK ? in->width - f : CHUNK;
    long rows = block->end - block->start, size = moesaic_size_of(in->type), halves = in->gated ? 2 : 1;

    const void *x[ROWS_MOST], *w[2 * CHUNK];
    for (long r = 0; r < rows; r++)
        x[r] = p->x + in->pick[block->start + r] / in->top_k * p->x_stride;
    const char *up = (const char *)in->up + block->expert * in->up_expert_stride * size;
    long feature[2 * CHUNK];
    for (long half = 0; half < halves; half++)
        for (long i = 0; i < features; i++) {
            long row = in->interleaved ? 2 * (f + i) + half : half * in->width + f + i;
            feature[half * features + i] = row;
            w[half * features + i] = up + row * in->up_row_stride * size;
        }
    long outs = halves * features;
    float *c = moesaic_scratch(0, rows * outs * (long)sizeof(float));
    memset(c, 0, (size_t)(rows * outs) * sizeof(float));
    dots(isa, in->type, p->x_type, x, rows, w, outs, in->hidden, c, outs);

    float bias[2 * CHUNK], value[CHUNK];
    if (in->up_bias)
        for (long i = 0; i < outs; i++)
            isa->widen[in->type]((const char *)in->up_bias + (block->expert * in->up_bias_stride + feature[i]) * size,
                                 bias + i, 1);
    for (long r = 0; r < rows; r++) {
        float *gate = c + r * outs;
        if (in->up_bias) isa->axpy(1.0f, bias, gate, outs);
        if (in->saved_up) {
            char *saved = (char *)in->saved_up + (block->start + r) * halves * in->width * size;
            if (in->interleaved)
                for (long i = 0; i < outs; i++) isa->narrow[in->type](gate + i, saved + feature[i] * size, 1);
            else
                for (long half = 0; half < halves; half++)
                    isa->narrow[in->type](gate + half * features, saved + (half * in->width + f) * size, features);
        }
        isa->activate(in->activation, in->alpha, in->limit, gate, in->gated ? gate + features : NULL, value, features);
        isa->narrow[p->x_type](value, p->h + (block->start + r) * p->h_stride + f * moesaic_size_of(p->x_type), features);
    }
}

/* The second projection for up to CHUNK outputs of every row, added to the tokens in the order of the experts. A task
 * owns its columns of y, so the sums need no lock and never depend on the number of threads. */
static void down_task(void *context, long task, int worker) {
    (void)worker;
    const pass *p = context;
    const moesaic_experts *in = p->in;
    const moesaic_isa *isa = p->isa;
    long d = task * p->down_chunk;
    long outs = in->hidden - d < p->down_chunk ? in->hidden - d : p->down_chunk;
    long size = moesaic_size_of(in->type);
    for (long t = 0; t < in->tokens; t++) memset(in->y + t * in->hidden + d, 0, (size_t)outs * sizeof(float));
    for (const segment *block = p->blocks; block < p->blocks + p->num_blocks; block++) {
        long rows = block->end - block->start;
        const void *x[ROWS_MOST], *w[CHUNK];
        for (long r = 0; r < rows; r++) x[r] = p->h + (block->start + r) * p->h_stride;
        const char *down = (const char *)in->down + block->expert * in->down_expert_stride * size;
        for (long i = 0; i < outs; i++) w[i] = down + (d + i) * in->down_row_stride * size;
        float *c = moesaic_scratch(0, rows * outs * (long)sizeof(float));
        float bias[CHUNK];
        memset(c, 0, (size_t)(rows * outs) * sizeof(float));
        dots(isa, in->type, p->x_type, x, rows, w, outs, in->width, c, outs);
        if (in->down_bias) {
            const char *biases = (const char *)in->down_bias + (block->expert * in->down_bias_stride + d) * size;
            isa->widen[in->type](biases, bias, outs);
        }
        for (long r = 0; r < rows; r++) {
            long pick = in->pick[block->start + r];
            if (in->down_bias) isa->axpy(1.0f, bias, c + r * outs, outs);
            isa->axpy(in->weight[pick], c + r * outs, in->y + pick / in->top_k * in->hidden + d, outs);
        }
    }
}

static void widen_task(void *context, long task, int worker) {
    (void)worker;
    const pass *p = context;
    const char *row = (const char *)p->in->x + task * p->in->x_stride * moesaic_size_of(p->in->type);
    p->isa->widen[p->in->type](row, (float *)(p->x + task * p->x_stride), p->in->hidden);
}

long moesaic_experts_forward(const moesaic_experts *in) {
    const moesaic_isa *isa = moesaic_isa_now;
    pass p = {.in = in, .isa = isa, .x_type = in->type == MOESAIC_BF16 && isa->dot_bf16 ? MOESAIC_BF16 : MOESAIC_F32};
    long x_size = moesaic_size_of(p.x_type), longest = in->hidden > in->width ? in->hidden : in->width;
    long most = ROWS_BYTES / (longest * x_size) / TILE_ROWS * TILE_ROWS;
    if (most < TILE_ROWS) most = TILE_ROWS;
    if (most > ROWS_MOST) most = ROWS_MOST;

    /* Two tasks or more for each thread, so that the slowest does not set the time. */
    p.down_chunk = CHUNK;
    while (p.down_chunk > 2 * TILE_OUT && in->hidden / p.down_chunk < 2 * in->threads) p.down_chunk /= 2;

    long rows = in->row_end[in->num_groups - 1];
    long block_bound = in->num_groups + rows / most + 1;
    segment *blocks = malloc((size_t)block_bound * sizeof *blocks);
    char *wide = p.x_type == in->type ? NULL : malloc((size_t)(in->tokens * in->hidden) * sizeof(float));
    p.h_stride = in->width * x_size;
    p.h = malloc((size_t)(rows * p.h_stride));
    if (!blocks || !p.h || (p.x_type != in->type && !wide)) {
        free(blocks), free(wide), free(p.h);
        return -1;
    }
    long start = 0;
    for (long group = 0; group < in->num_groups; group++) {
        /* Blocks of equal height: a last block of one row would read all weights for it. */
        long end = in->row_end[group], parts = (end - start + most - 1) / most;
        for (long part = 0; part < parts; part++) {
            long from = start + (end - start) * part / parts, to = start + (end - start) * (part + 1) / parts;
            blocks[p.num_blocks++] = (segment){in->expert[group], from, to};
        }
        start = end;
    }
    p.blocks = blocks;
    p.x = in->x;
    p.x_stride = in->x_stride * moesaic_size_of(in->type);
    if (wide) {
        p.x = wide;
        p.x_stride = in->hidden * (long)sizeof(float);
        moesaic_parallel(in->threads, in->tokens, widen_task, &p);
    }
    moesaic_parallel(in->threads, p.num_blocks * ((in->width + CHUNK - 1) / CHUNK), up_task, &p);
    moesaic_parallel(in->threads, (in->hidden + p.down_chunk - 1) / p.down_chunk, down_task, &p);
    free(blocks), free(wide), free(p.h);
    return 0;
}
