/* Backward pass of packed experts from the rows of the first projection. In four steps, each over independent tasks that
 * write what no other task writes, in an order of additions that never depends on the number of threads:
 *
 *   1. dH = dY[token] Wdown; the activation once more; dU = w act'(U) dH, V = w act(U), and dw = <dH, act(U)>
 *   2. dWdown = dY[token]^T V
 *   3. dWup = dU^T X[token]
 *   4. dX[token] += dU Wup
 */
#include "backward.h"

#include <stdlib.h>
#include <string.h>

#include "memory.h"
#include "packed.h"
#include "threads.h"

typedef struct {
    const moesaic_backward *in;
    const moesaic_experts *forward;
    const moesaic_isa *isa;
    long size, halves, rows, up_width;
    const moesaic_segment *blocks; /* rows of one expert, at most BLOCK_ROWS */
    long num_blocks;
    const moesaic_segment *experts; /* all of them */
    long f_blocks;          /* of the first step */
    float *parts;           /* [f_blocks][rows], dw of each */
    char *u_grad, *weighted;
    long columns;           /* of one task of the fourth step */
    int failed;
} pass;

enum { SLOT_VALUES = 5 };

/* Gate and up of one row as float32, features [f, f + n), from or to a row of the first projection. */
static void split(const pass *p, const char *row, long f, long n, float *gate, float *up, float *both) {
    const moesaic_experts *e = p->forward;
    if (!e->gated) {
        p->isa->widen[e->type](row + f * p->size, gate, n);
    } else if (!e->interleaved) {
        p->isa->widen[e->type](row + f * p->size, gate, n);
        p->isa->widen[e->type](row + (e->width + f) * p->size, up, n);
    } else {
        p->isa->widen[e->type](row + 2 * f * p->size, both, 2 * n);
        for (long i = 0; i < n; i++) gate[i] = both[2 * i], up[i] = both[2 * i + 1];
    }
}
static void join(const pass *p, char *row, long f, long n, const float *gate, const float *up, float *both) {
    const moesaic_experts *e = p->forward;
    if (!e->gated) {
        p->isa->narrow[e->type](gate, row + f * p->size, n);
    } else if (!e->interleaved) {
        p->isa->narrow[e->type](gate, row + f * p->size, n);
        p->isa->narrow[e->type](up, row + (e->width + f) * p->size, n);
    } else {
        for (long i = 0; i < n; i++) both[2 * i] = gate[i], both[2 * i + 1] = up[i];
        p->isa->narrow[e->type](both, row + 2 * f * p->size, 2 * n);
    }
}

/* Step 1 for one block of rows and up to BLOCK_COLUMNS features. */
static void activation_task(void *context, long task, int worker) {
    (void)worker;
    pass *p = context;
    const moesaic_backward *in = p->in;
    const moesaic_experts *e = p->forward;
    const moesaic_segment *block = &p->blocks[task / p->f_blocks];
    long part = task % p->f_blocks, f = part * BLOCK_COLUMNS, n = least(e->width - f, BLOCK_COLUMNS), ldc;
    moesaic_operand a = moesaic_picked(e, in->y_grad, in->y_grad_stride, block->start, 1);
    moesaic_operand b = moesaic_inputs(e, e->down, e->down_expert_stride, e->down_row_stride, block->expert, e->down_transposed, f);
    const float *c = moesaic_product(e->type, &a, block->end - block->start, &b, n, e->hidden, &ldc);
    float *values = moesaic_scratch(SLOT_VALUES, 6 * BLOCK_COLUMNS * (long)sizeof(float));
    if (!c || !values) {
        p->failed = 1;
        return;
    }
    float *gate = values, *up = e->gated ? gate + BLOCK_COLUMNS : 0, *h = gate + 2 * BLOCK_COLUMNS, *both = h + BLOCK_COLUMNS;
    for (long row = block->start; row < block->end; row++) {
        split(p, (const char *)e->saved_up + row * p->up_width * p->size, f, n, gate, up, both);
        p->parts[part * p->rows + row] =
            p->isa->activate_backward(e->activation, e->alpha, e->limit, e->weight[e->pick[row]],
                                      c + (row - block->start) * ldc, gate, up, h, n);
        if (p->u_grad) join(p, p->u_grad + row * p->up_width * p->size, f, n, gate, up, both);
        if (p->weighted) p->isa->narrow[e->type](h, p->weighted + (row * e->width + f) * p->size, n);
    }
}

/* Gradients of combine weights and biases, for one expert. */
static void sums_task(void *context, long task, int worker) {
    (void)worker;
    pass *p = context;
    const moesaic_backward *in = p->in;
    const moesaic_experts *e = p->forward;
    const moesaic_segment *expert = &p->experts[task];
    long longest = e->hidden > p->up_width ? e->hidden : p->up_width;
    float *value = moesaic_scratch(SLOT_VALUES, 2 * longest * (long)sizeof(float)), *bias = value + longest;
    if (!value) {
        p->failed = 1;
        return;
    }
    const char *biases = (const char *)e->down_bias + expert->expert * e->down_bias_stride * p->size;
    float *down = in->down_bias_grad ? in->down_bias_grad + expert->expert * e->hidden : 0;
    float *up = in->up_bias_grad ? in->up_bias_grad + expert->expert * p->up_width : 0;
    int biased = in->weight_grad && e->down_bias;
    if (biased) p->isa->widen[e->type](biases, bias, e->hidden);
    if (down) memset(down, 0, (size_t)e->hidden * sizeof(float));
    if (up) memset(up, 0, (size_t)p->up_width * sizeof(float));
    for (long row = expert->start; row < expert->end; row++) {
        long pick = e->pick[row];
        if (biased || down)
            p->isa->widen[e->type]((const char *)in->y_grad + pick / e->top_k * in->y_grad_stride * p->size, value, e->hidden);
        if (in->weight_grad) {
            float sum = 0;
            for (long part = 0; part < p->f_blocks; part++) sum += p->parts[part * p->rows + row];
            const void *left = value, *right = bias;
            if (biased) p->isa->dot[MOESAIC_F32](&left, &right, 1, 1, e->hidden, &sum, 1);
            in->weight_grad[pick] = sum;
        }
        if (down) p->isa->axpy(e->weight[pick], value, down, e->hidden);
        if (up) {
            p->isa->widen[e->type](p->u_grad + row * p->up_width * p->size, value, p->up_width);
            p->isa->axpy(1.0f, value, up, p->up_width);
        }
    }
}

/* One block of the gradient of an expert's weight, left^T right over the expert's rows; (height, width) is stored. */
static void weight_grad_block(pass *p, moesaic_operand left, moesaic_operand right, const moesaic_segment *expert, long height,
                              long width, long block, char *grad) {
    long across = parts_of(width, BLOCK_COLUMNS), i = block / across * BLOCK_ROWS, j = block % across * BLOCK_COLUMNS;
    long rows = least(height - i, BLOCK_ROWS), columns = least(width - j, BLOCK_COLUMNS);
    char *out = grad + (expert->expert * height * width + i * width + j) * p->size;
    if (expert->start == expert->end) {
        for (long r = 0; r < rows; r++) memset(out + r * width * p->size, 0, (size_t)(columns * p->size));
        return;
    }
    left.offset = i;
    right.offset = j;
    long k = expert->end - expert->start;
    if (!moesaic_product_to(p->forward->type, &left, rows, &right, columns, k, out, width * p->size)) p->failed = 1;
}

static long weight_grad_blocks(long height, long width) {
    return parts_of(height, BLOCK_ROWS) * parts_of(width, BLOCK_COLUMNS);
}

static void down_grad_task(void *context, long task, int worker) {
    (void)worker;
    pass *p = context;
    const moesaic_experts *e = p->forward;
    int transposed = p->forward->down_transposed;
    long height = transposed ? e->width : e->hidden, width = transposed ? e->hidden : e->width;
    long blocks = weight_grad_blocks(height, width);
    const moesaic_segment *expert = &p->experts[task / blocks];
    moesaic_operand out = moesaic_picked(e, p->in->y_grad, p->in->y_grad_stride, expert->start, 0);
    moesaic_operand in = moesaic_plain(e, p->weighted, e->width, expert->start, 0, 0);
    weight_grad_block(p, transposed ? in : out, transposed ? out : in, expert, height, width, task % blocks,
                      p->in->down_grad);
}

static void up_grad_task(void *context, long task, int worker) {
    (void)worker;
    pass *p = context;
    const moesaic_experts *e = p->forward;
    int transposed = p->forward->up_transposed;
    long height = transposed ? e->hidden : p->up_width, width = transposed ? p->up_width : e->hidden;
    long blocks = weight_grad_blocks(height, width);
    const moesaic_segment *expert = &p->experts[task / blocks];
    moesaic_operand out = moesaic_plain(e, p->u_grad, p->up_width, expert->start, 0, 0);
    moesaic_operand in = moesaic_picked(e, e->x, e->x_stride, expert->start, 0);
    weight_grad_block(p, transposed ? in : out, transposed ? out : in, expert, height, width, task % blocks, p->in->up_grad);
}

/* Step 4 for some columns of every token: a task owns them, so the sums over picks need no lock. */
static void x_grad_task(void *context, long task, int worker) {
    (void)worker;
    pass *p = context;
    const moesaic_experts *e = p->forward;
    long d = task * p->columns, n = least(e->hidden - d, p->columns);
    for (long t = 0; t < e->tokens; t++) memset(p->in->x_grad + t * e->hidden + d, 0, (size_t)n * sizeof(float));
    for (const moesaic_segment *block = p->blocks; block < p->blocks + p->num_blocks; block++) {
        long ldc;
        moesaic_operand a = moesaic_plain(e, p->u_grad, p->up_width, block->start, 1, 0);
        moesaic_operand b = moesaic_inputs(e, e->up, e->up_expert_stride, e->up_row_stride, block->expert, p->forward->up_transposed, d);
        const float *c = moesaic_product(e->type, &a, block->end - block->start, &b, n, p->up_width, &ldc);
        if (!c) {
            p->failed = 1;
            return;
        }
        for (long row = block->start; row < block->end; row++)
            p->isa->axpy(1.0f, c + (row - block->start) * ldc, p->in->x_grad + e->pick[row] / e->top_k * e->hidden + d, n);
    }
}

/* The rows of every expert. */
static void find_experts(const moesaic_experts *e, long num_experts, moesaic_segment *experts) {
    for (long i = 0; i < num_experts; i++) experts[i] = (moesaic_segment){i, 0, 0};
    for (long group = 0, start = 0; group < e->num_groups; start = e->row_end[group++])
        experts[e->expert[group]] = (moesaic_segment){e->expert[group], start, e->row_end[group]};
}

static void run(pass *p) {
    const moesaic_backward *in = p->in;
    const moesaic_experts *e = p->forward;
    int threads = (int)e->threads;
    if (p->parts) moesaic_parallel(threads, p->num_blocks * p->f_blocks, activation_task, p);
    if (in->weight_grad || in->down_bias_grad || in->up_bias_grad) moesaic_parallel(threads, in->num_experts, sums_task, p);
    if (in->down_grad)
        moesaic_parallel(threads, in->num_experts * weight_grad_blocks(e->down_transposed ? e->width : e->hidden,
                                                                       e->down_transposed ? e->hidden : e->width),
                         down_grad_task, p);
    free(p->weighted);
    p->weighted = 0;
    if (in->up_grad)
        moesaic_parallel(threads, in->num_experts * weight_grad_blocks(e->up_transposed ? e->hidden : p->up_width,
                                                                       e->up_transposed ? p->up_width : e->hidden),
                         up_grad_task, p);
    if (in->x_grad) {
        p->columns = moesaic_columns(e, p->isa);
        moesaic_parallel(threads, parts_of(e->hidden, p->columns), x_grad_task, p);
    }
}

long moesaic_experts_backward(const moesaic_backward *in) {
    const moesaic_experts *e = &in->forward;
    pass p = {.in = in, .forward = e, .isa = moesaic_isa_now, .size = moesaic_size_of(e->type), .halves = e->gated ? 2 : 1};
    p.rows = e->num_groups ? e->row_end[e->num_groups - 1] : 0;
    p.up_width = p.halves * e->width;
    p.f_blocks = parts_of(e->width, BLOCK_COLUMNS);
    int needs_u = in->x_grad || in->up_grad || in->up_bias_grad, needs_v = in->down_grad != 0;
    int first_step = needs_u || needs_v || in->weight_grad;
    moesaic_segment *blocks = malloc((size_t)moesaic_blocks_most(e) * sizeof *blocks);
    moesaic_segment *experts = malloc((size_t)in->num_experts * sizeof *experts);
    p.failed = !blocks || !experts;
    if (needs_u) p.failed |= !(p.u_grad = moesaic_allocate(p.rows * p.up_width * p.size + 1));
    if (needs_v) p.failed |= !(p.weighted = moesaic_allocate(p.rows * e->width * p.size + 1));
    if (first_step) p.failed |= !(p.parts = malloc((size_t)(p.f_blocks * p.rows + 1) * sizeof(float)));
    if (!p.failed) {
        find_experts(e, in->num_experts, experts);
        p.num_blocks = moesaic_cut(e, BLOCK_ROWS, blocks);
        p.blocks = blocks;
        p.experts = experts;
        run(&p);
    }
    free(blocks), free(experts), free(p.u_grad), free(p.weighted), free(p.parts);
    return p.failed ? -1 : 0;
}
