#include "decode.h"
#include "isa.h"
#include "threads.h"

#include <math.h>

void moesaic_round(int64_t type, float *values, long n, void *spare) {
    if (type == MOESAIC_F32) return;
    moesaic_isa_now->narrow[type](values, spare, n);
    moesaic_isa_now->widen[type](spare, values, n);
}

void moesaic_norm_rows(const moesaic_norm *in, const void *x, int64_t x_stride, int64_t rows, void *y) {
    const moesaic_isa *isa = moesaic_isa_now;
    long n = in->width, size = moesaic_size_of((int)in->type);
    float *value = moesaic_scratch(SLOT_NORM, 3 * n * (long)sizeof(float)), *weight = value + n, *spare = weight + n;
    isa->widen[in->type](in->weight, weight, n);
    for (long row = 0; row < rows; row++) {
        float squares = 0;
        const void *self = value;
        isa->widen[in->type]((const char *)x + row * x_stride * size, value, n);
        isa->dot[MOESAIC_F32](&self, &self, 1, 1, n, &squares, 1);
        float factor = 1.0f / sqrtf(squares / (float)n + (float)in->epsilon);
        for (long i = 0; i < n; i++) value[i] *= factor;
        moesaic_round(in->type, value, n, spare);
        for (long i = 0; i < n; i++) value[i] *= weight[i];
        isa->narrow[in->type](value, (char *)y + row * n * size, n);
    }
}
