/* Forward pass of packed experts whose weights are stored (out, in): each output is a dot product of two rows that are
 * contiguous in memory, so neither operand is copied or repacked, for one row or for thousands. */
#include "experts.h"

#include <stdlib.h>
#include <string.h>

#include "dots.h"
#include "threads.h"

enum { CHUNK = 128 /* most features or outputs of one task */ };

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
    long up_chunk;       /* features of one task of the first projection */
    long down_chunk;     /* outputs of one task of the second */
} pass;

/* Which row of the first projection stands at place `i` of a task that has `features` gates and then as many ups. */
static long row_of(const moesaic_experts *in, long f, long features, long i) {
    long half = i / features, feature = f + i % features;
    return in->interleaved ? 2 * feature + half : half * in->width + feature;
}

/* The first projection and the activation for one block of rows and up to CHUNK features. */
static void up_task(void *context, long task, int worker) {
    (void)worker;
    const pass *p = context;
    const moesaic_experts *in = p->in;
    const moesaic_isa *isa = p->isa;
    long chunks = (in->width + p->up_chunk - 1) / p->up_chunk;
    const segment *block = &p->blocks[task / chunks];
    long f = task % chunks * p->up_chunk;
    long features = in->width - f < p->up_chunk ? in->width - f : p->up_chunk;
    long rows = block->end - block->start, size = moesaic_size_of(in->type), halves = in->gated ? 2 : 1;

    moesaic_rows x = {.rows = rows, .k = in->hidden, .type = p->x_type};
    for (long r = 0; r < rows; r++) x.row[r] = p->x + in->pick[block->start + r] / in->top_k * p->x_stride;
    moesaic_rows_prepare(&x);
    long outs = halves * features, stride = in->up_row_stride * size;
    /* Gate and up alternate, or one follows the other. */
    long step = in->interleaved ? 2 * stride : stride, apart = in->interleaved ? stride : in->width * stride;
    const char *up = (const char *)in->up + block->expert * in->up_expert_stride * size + f * step;
    float *c = moesaic_scratch(0, rows * outs * (long)sizeof(float));
    memset(c, 0, (size_t)(rows * outs) * sizeof(float));
    for (long half = 0; half < halves; half++)
        moesaic_dots(isa, in->type, &x, up + half * apart, step, features, half + 1 < halves ? up + apart : NULL,
                     c + half * features, outs);

    float bias[2 * CHUNK], value[CHUNK];
    if (in->up_bias)
        for (long i = 0; i < outs; i++)
            isa->widen[in->type]((const char *)in->up_bias + (block->expert * in->up_bias_stride + row_of(in, f, features, i)) * size,
                                 bias + i, 1);
    for (long r = 0; r < rows; r++) {
        float *gate = c + r * outs;
        if (in->up_bias) isa->axpy(1.0f, bias, gate, outs);
        if (in->saved_up) {
            char *saved = (char *)in->saved_up + (block->start + r) * halves * in->width * size;
            if (in->interleaved)
                for (long i = 0; i < outs; i++) isa->narrow[in->type](gate + i, saved + row_of(in, f, features, i) * size, 1);
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
        moesaic_rows x = {.rows = rows, .k = in->width, .type = p->x_type};
        for (long r = 0; r < rows; r++) x.row[r] = p->h + (block->start + r) * p->h_stride;
        moesaic_rows_prepare(&x);
        const char *first = (const char *)in->down + d * in->down_row_stride * size;
        const char *down = first + block->expert * in->down_expert_stride * size, *after = NULL;
        if (block + 1 < p->blocks + p->num_blocks) after = first + block[1].expert * in->down_expert_stride * size;
        float *c = moesaic_scratch(0, rows * outs * (long)sizeof(float));
        float bias[CHUNK];
        memset(c, 0, (size_t)(rows * outs) * sizeof(float));
        moesaic_dots(isa, in->type, &x, down, in->down_row_stride * size, outs, after, c, outs);
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

/* Outputs of one task: enough tasks that the slowest does not set the time, none smaller than two tiles. */
static long chunk_of(long outputs, long blocks, long threads) {
    long chunk = CHUNK;
    while (chunk > 2 * TILE_OUT && blocks * outputs < 4 * threads * chunk) chunk /= 2;
    return chunk;
}

long moesaic_experts_forward(const moesaic_experts *in) {
    const moesaic_isa *isa = moesaic_isa_now;
    pass p = {.in = in, .isa = isa, .x_type = moesaic_type_of_x(isa, in->type)};
    long x_size = moesaic_size_of(p.x_type), longest = in->hidden > in->width ? in->hidden : in->width;
    long most = moesaic_rows_at_once(longest, p.x_type);

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
    p.up_chunk = chunk_of(in->width, p.num_blocks, in->threads);
    p.down_chunk = chunk_of(in->hidden, 1, in->threads);
    p.x = in->x;
    p.x_stride = in->x_stride * moesaic_size_of(in->type);
    if (wide) {
        p.x = wide;
        p.x_stride = in->hidden * (long)sizeof(float);
        moesaic_parallel(in->threads, in->tokens, widen_task, &p);
    }
    moesaic_parallel(in->threads, p.num_blocks * ((in->width + p.up_chunk - 1) / p.up_chunk), up_task, &p);
    moesaic_parallel(in->threads, (in->hidden + p.down_chunk - 1) / p.down_chunk, down_task, &p);
    free(blocks), free(wide), free(p.h);
    return 0;
}
