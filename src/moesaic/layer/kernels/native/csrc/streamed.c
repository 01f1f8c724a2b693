/* Forward pass for few rows of experts whose weights are stored (in, out): each weight row in use is read once, from its
 * start to its end, and added to the sums of every row of its expert. */
#include <stdlib.h>
#include <string.h>

#include "packed.h"
#include "threads.h"

enum {
    NARROWEST = 256, /* columns of a task: shorter stretches of a weight row don't reach the memory's speed */
};

typedef struct {
    const moesaic_experts *in;
    const moesaic_isa *isa;
    const moesaic_segment *blocks;
    long num_blocks, size, halves, features, columns; /* features and columns of one task */
    float *x, *u, *h, *out; /* rows in expert order; x in token order */
} pass;

static void widen_task(void *context, long task, int worker) {
    (void)worker;
    const pass *p = context;
    const moesaic_experts *in = p->in;
    p->isa->widen[in->type]((const char *)in->x + task * in->x_stride * p->size, p->x + task * in->hidden, in->hidden);
}

/* c[rows][n] = bias + x w for columns [first, first + n) of a weight. */
static void stream(const pass *p, const moesaic_segment *block, const float *const *x, const char *w, long stride, long k,
                   const char *bias, long first, long n, float *c, long ldc) {
    long rows = block->end - block->start;
    const moesaic_experts *in = p->in;
    for (long r = 0; r < rows; r++)
        if (bias) p->isa->widen[in->type](bias + first * p->size, c + r * ldc + first, n);
        else memset(c + r * ldc + first, 0, (size_t)n * sizeof(float));
    p->isa->stream[in->type](x, (int)rows, w + first * p->size, stride, k, c + first, ldc, n);
}

static void up_task(void *context, long task, int worker) {
    (void)worker;
    const pass *p = context;
    const moesaic_experts *in = p->in;
    long chunks = parts_of(in->width, p->features), f = task % chunks * p->features, n = least(in->width - f, p->features);
    const moesaic_segment *block = &p->blocks[task / chunks];
    long up_width = p->halves * in->width;
    const float *x[STREAM_MOST];
    for (long row = block->start; row < block->end; row++)
        x[row - block->start] = p->x + in->pick[row] / in->top_k * in->hidden;
    const char *w = (const char *)in->up + block->expert * in->up_expert_stride * p->size;
    const char *bias = in->up_bias ? (const char *)in->up_bias + block->expert * in->up_bias_stride * p->size : 0;
    float *u = p->u + block->start * up_width;
    if (in->interleaved) {
        stream(p, block, x, w, in->up_row_stride, in->hidden, bias, 2 * f, 2 * n, u, up_width);
    } else {
        for (long half = 0; half < p->halves; half++)
            stream(p, block, x, w, in->up_row_stride, in->hidden, bias, half * in->width + f, n, u, up_width);
    }
    for (long row = block->start; row < block->end; row++, u += up_width) {
        float *h = p->h + row * in->width + f, *gate = u + f, *up = in->gated ? gate + in->width : 0;
        if (in->interleaved) {
            /* Gate goes to where h will be, which reads each value before it writes it; up to the next pass's room. */
            gate = h, up = p->out + row * in->width + f;
            for (long i = 0; i < n; i++) gate[i] = u[2 * (f + i)], up[i] = u[2 * (f + i) + 1];
        }
        p->isa->activate(in->activation, in->alpha, in->limit, gate, up, h, n);
    }
}

static void save_task(void *context, long row, int worker) {
    (void)worker;
    const pass *p = context;
    long up_width = p->halves * p->in->width;
    p->isa->narrow[p->in->type](p->u + row * up_width, (char *)p->in->saved_up + row * up_width * p->size, up_width);
}

static void down_task(void *context, long task, int worker) {
    (void)worker;
    const pass *p = context;
    const moesaic_experts *in = p->in;
    long chunks = parts_of(in->hidden, p->columns), d = task % chunks * p->columns, n = least(in->hidden - d, p->columns);
    const moesaic_segment *block = &p->blocks[task / chunks];
    const float *h[STREAM_MOST];
    for (long row = block->start; row < block->end; row++) h[row - block->start] = p->h + row * in->width;
    const char *w = (const char *)in->down + block->expert * in->down_expert_stride * p->size;
    const char *bias = in->down_bias ? (const char *)in->down_bias + block->expert * in->down_bias_stride * p->size : 0;
    stream(p, block, h, w, in->down_row_stride, in->width, bias, d, n, p->out + block->start * in->hidden, in->hidden);
}

/* Adds rows to their tokens in the order of the experts. */
static void combine_task(void *context, long task, int worker) {
    (void)worker;
    const pass *p = context;
    const moesaic_experts *in = p->in;
    long d = task * p->columns, n = least(in->hidden - d, p->columns), rows = in->row_end[in->num_groups - 1];
    for (long t = 0; t < in->tokens; t++) memset(in->y + t * in->hidden + d, 0, (size_t)n * sizeof(float));
    for (long row = 0; row < rows; row++) {
        long pick = in->pick[row];
        p->isa->axpy(in->weight[pick], p->out + row * in->hidden + d, in->y + pick / in->top_k * in->hidden + d, n);
    }
}

/* Columns of a task so that there are two for each thread, if the rows of the weights are long enough. */
static long stretch_of(long columns, long blocks, long threads) {
    long chunks = parts_of(2 * threads, blocks), each = parts_of(columns, chunks);
    each = parts_of(each, NARROWEST) * NARROWEST;
    return each < columns ? each : columns;
}

long moesaic_experts_forward_streamed(const moesaic_experts *in) {
    pass p = {.in = in, .isa = moesaic_isa_now, .size = moesaic_size_of(in->type), .halves = in->gated ? 2 : 1};
    long rows = in->row_end[in->num_groups - 1], longest = in->hidden > in->width ? in->hidden : in->width;
    moesaic_segment *blocks = malloc((size_t)(in->num_groups + rows / STREAM_MOST + 1) * sizeof *blocks);
    long each = (p.halves + 1) * in->width + longest;
    float *room = malloc((size_t)(rows * each + in->tokens * in->hidden) * sizeof *room);
    if (!blocks || !room) {
        free(blocks), free(room);
        return -1;
    }
    p.u = room;
    p.h = p.u + rows * p.halves * in->width;
    p.out = p.h + rows * in->width;
    p.x = p.out + rows * longest;
    p.num_blocks = moesaic_cut(in, STREAM_MOST, blocks);
    p.blocks = blocks;
    p.features = stretch_of(in->width, p.num_blocks, in->threads);
    p.columns = stretch_of(in->hidden, p.num_blocks, in->threads);
    int threads = (int)in->threads;
    moesaic_parallel(threads, in->tokens, widen_task, &p);
    moesaic_parallel(threads, p.num_blocks * parts_of(in->width, p.features), up_task, &p);
    if (in->saved_up) moesaic_parallel(threads, rows, save_task, &p);
    moesaic_parallel(threads, p.num_blocks * parts_of(in->hidden, p.columns), down_task, &p);
    moesaic_parallel(threads, parts_of(in->hidden, p.columns), combine_task, &p);
    free(blocks), free(room);
    return 0;
}
