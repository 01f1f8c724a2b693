/* Backward pass of packed experts from the rows of the first projection. Batches of experts take two steps each, over
 * independent tasks that write what no other task writes, in an order of additions that never depends on the number of
 * threads:
 *
 *   1. dH = dY[token] Wdown; the activation once more; dU = w act'(U) dH, V = w act(U), and parts of dw = <dH, act(U)>
 *   2. dX[token] += dU Wup; dWup = dU^T X[token]; dWdown = dY[token]^T V; sums over dw, dU and dY
 *
 * A batch's dU and V stay in the third-level cache, in memory that malloc does not have to get from the system.
 */
#include "backward.h"

#include <stdatomic.h>
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
    const moesaic_segment *blocks; /* rows of one expert, at most BLOCK_ROWS: of this batch */
    long num_blocks;
    const moesaic_segment *experts; /* of this batch */
    long num_experts, start;        /* first row of this batch */
    long f_blocks;          /* of the first step */
    float *parts;           /* [f_blocks][rows], dw of each */
    char *u_grad, *weighted; /* rows of this batch, */
    long u_stride, v_stride; /* so far apart that the same column of many rows fits the second-level cache */
    long columns;           /* of one task for dX */
    long x_tasks, up_tasks, down_tasks, sum_tasks; /* of the second step */
    atomic_int failed;
} pass;

enum { SLOT_VALUES = 5 };

/* Bytes of dU and V of a batch, for each thread; more threads need more tasks. */
enum { BATCH_BYTES = 8 * 1024 * 1024 };

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

/* Asks for a row of the first projection: rows are far apart and the forward pass left them in memory. */
static void ask(const pass *p, long row, long f, long n) {
    const moesaic_experts *e = p->forward;
    const char *at = (const char *)e->saved_up + row * p->up_width * p->size;
    long sets = e->gated && !e->interleaved ? 2 : 1, each = e->interleaved ? 2 : 1;
    for (long set = 0; set < sets; set++)
        for (long byte = 0; byte < each * n * p->size; byte += 64)
            __builtin_prefetch(at + (set * e->width + each * f) * p->size + byte, 0, 3);
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
        if (row + 2 < block->end) ask(p, row + 2, f, n);
        split(p, (const char *)e->saved_up + row * p->up_width * p->size, f, n, gate, up, both);
        p->parts[part * p->rows + row] =
            p->isa->activate_backward(e->activation, e->alpha, e->limit, e->weight[e->pick[row]],
                                      c + (row - block->start) * ldc, gate, up, h, n);
        if (p->u_grad) join(p, p->u_grad + (row - p->start) * p->u_stride * p->size, f, n, gate, up, both);
        if (p->weighted) p->isa->narrow[e->type](h, p->weighted + ((row - p->start) * p->v_stride + f) * p->size, n);
    }
}

/* Gradients of combine weights and biases, for one expert. */
static void sums_task(pass *p, long task) {
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
            p->isa->widen[e->type](p->u_grad + (row - p->start) * p->u_stride * p->size, value, p->up_width);
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

/* Weights as they are stored: height and width of an expert's matrix, and blocks of its gradient. */
typedef struct {
    long height, width, blocks;
} matrix;

static matrix matrix_of(long outputs, long inputs, int transposed) {
    matrix m = {transposed ? inputs : outputs, transposed ? outputs : inputs, 0};
    m.blocks = parts_of(m.height, BLOCK_ROWS) * parts_of(m.width, BLOCK_COLUMNS);
    return m;
}
static matrix down_matrix(const moesaic_experts *e) { return matrix_of(e->hidden, e->width, e->down_transposed); }
static matrix up_matrix(const moesaic_experts *e) {
    return matrix_of(e->gated ? 2 * e->width : e->width, e->hidden, e->up_transposed);
}

static void down_grad_task(pass *p, long task) {
    const moesaic_experts *e = p->forward;
    matrix m = down_matrix(e);
    const moesaic_segment *expert = &p->experts[task / m.blocks];
    moesaic_operand out = moesaic_picked(e, p->in->y_grad, p->in->y_grad_stride, expert->start, 0);
    moesaic_operand in = moesaic_plain(e, p->weighted, p->v_stride, expert->start - p->start, 0, 0);
    weight_grad_block(p, e->down_transposed ? in : out, e->down_transposed ? out : in, expert, m.height, m.width,
                      task % m.blocks, p->in->down_grad);
}

static void up_grad_task(pass *p, long task) {
    const moesaic_experts *e = p->forward;
    matrix m = up_matrix(e);
    const moesaic_segment *expert = &p->experts[task / m.blocks];
    moesaic_operand out = moesaic_plain(e, p->u_grad, p->u_stride, expert->start - p->start, 0, 0);
    moesaic_operand in = moesaic_picked(e, e->x, e->x_stride, expert->start, 0);
    weight_grad_block(p, e->up_transposed ? in : out, e->up_transposed ? out : in, expert, m.height, m.width,
                      task % m.blocks, p->in->up_grad);
}

/* dX for some columns of every token: a task owns them, so the sums over picks need no lock. */
static void x_grad_task(pass *p, long task) {
    const moesaic_experts *e = p->forward;
    long d = task * p->columns, n = least(e->hidden - d, p->columns);
    for (long t = 0; p->start == 0 && t < e->tokens; t++)
        memset(p->in->x_grad + t * e->hidden + d, 0, (size_t)n * sizeof(float));
    for (const moesaic_segment *block = p->blocks; block < p->blocks + p->num_blocks; block++) {
        long ldc;
        moesaic_operand a = moesaic_plain(e, p->u_grad, p->u_stride, block->start - p->start, 1, 0);
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

/* The second step; the longest tasks come first. */
static void gradient_task(void *context, long task, int worker) {
    (void)worker;
    pass *p = context;
    if (task < p->x_tasks) x_grad_task(p, task);
    else if ((task -= p->x_tasks) < p->up_tasks) up_grad_task(p, task);
    else if ((task -= p->up_tasks) < p->down_tasks) down_grad_task(p, task);
    else sums_task(p, task - p->down_tasks);
}

/* The rows of every expert. */
static void find_experts(const moesaic_experts *e, long num_experts, moesaic_segment *experts) {
    for (long i = 0, group = 0, start = 0; i < num_experts; i++) {
        int has_rows = group < e->num_groups && e->expert[group] == i;
        long end = has_rows ? e->row_end[group++] : start;
        experts[i] = (moesaic_segment){i, start, end};
        start = end;
    }
}

/* How many of the experts make a batch: as many as have at most `most` rows, but one at least. */
static long batch_of(const moesaic_segment *experts, long count, long most) {
    long taken = 1;
    while (taken < count && experts[taken].end - experts[0].start <= most) taken++;
    return taken;
}

static void run_batch(pass *p) {
    const moesaic_backward *in = p->in;
    const moesaic_experts *e = p->forward;
    int threads = (int)e->threads;
    if (p->parts) moesaic_parallel(threads, p->num_blocks * p->f_blocks, activation_task, p);
    p->x_tasks = in->x_grad ? parts_of(e->hidden, p->columns) : 0;
    p->up_tasks = in->up_grad ? p->num_experts * up_matrix(e).blocks : 0;
    p->down_tasks = in->down_grad ? p->num_experts * down_matrix(e).blocks : 0;
    p->sum_tasks = in->weight_grad || in->down_bias_grad || in->up_bias_grad ? p->num_experts : 0;
    moesaic_parallel(threads, p->x_tasks + p->up_tasks + p->down_tasks + p->sum_tasks, gradient_task, p);
}

/* The next batch after this one; 0 if there is none. */
static int next_batch(pass *p, const moesaic_segment *end, long most) {
    p->experts += p->num_experts;
    p->blocks += p->num_blocks;
    if (p->experts == end) return 0;
    p->num_experts = batch_of(p->experts, end - p->experts, most);
    p->start = p->experts->start;
    for (p->num_blocks = 0; p->blocks[p->num_blocks].start < p->experts[p->num_experts - 1].end;) p->num_blocks++;
    return 1;
}

/* An odd number of lines, for 16-bit types. */
static long spread(long columns) { return (parts_of(columns, 32) | 1) * 32; }

static long rows_of_batch(const pass *p) { return p->experts[p->num_experts - 1].end - p->start; }

long moesaic_experts_backward(const moesaic_backward *in) {
    const moesaic_experts *e = &in->forward;
    pass p = {.in = in, .forward = e, .isa = moesaic_isa_now, .size = moesaic_size_of(e->type), .halves = e->gated ? 2 : 1};
    p.rows = e->num_groups ? e->row_end[e->num_groups - 1] : 0;
    p.up_width = p.halves * e->width;
    p.f_blocks = parts_of(e->width, BLOCK_COLUMNS);
    p.u_stride = spread(p.up_width);
    p.v_stride = spread(e->width);
    p.columns = moesaic_columns(e, p.isa);
    int needs_u = in->x_grad || in->up_grad || in->up_bias_grad, needs_v = in->down_grad != 0;
    int first_step = needs_u || needs_v || in->weight_grad;
    moesaic_segment *blocks = malloc((size_t)moesaic_blocks_most(e) * sizeof *blocks);
    moesaic_segment *experts = malloc((size_t)in->num_experts * sizeof *experts);
    p.failed = !blocks || !experts;
    if (!p.failed) {
        find_experts(e, in->num_experts, experts);
        /* No block begins where the rows end. */
        blocks[moesaic_cut(e, BLOCK_ROWS, blocks)].start = p.rows;
        long most = BATCH_BYTES * e->threads / ((p.u_stride + p.v_stride) * p.size), largest = 0;
        const moesaic_segment *end = experts + in->num_experts;
        for (p.experts = experts, p.blocks = blocks; next_batch(&p, end, most);)
            if (rows_of_batch(&p) > largest) largest = rows_of_batch(&p);
        if (needs_u) p.failed |= !(p.u_grad = moesaic_allocate(largest * p.u_stride * p.size + 1));
        if (needs_v) p.failed |= !(p.weighted = moesaic_allocate(largest * p.v_stride * p.size + 1));
        if (first_step) p.failed |= !(p.parts = malloc((size_t)(p.f_blocks * p.rows + 1) * sizeof(float)));
        p.num_experts = p.num_blocks = 0;
        for (p.experts = experts, p.blocks = blocks; !p.failed && next_batch(&p, end, most);) run_batch(&p);
    }
    free(blocks), free(experts), free(p.u_grad), free(p.weighted), free(p.parts);
    return p.failed ? -1 : 0;
}
