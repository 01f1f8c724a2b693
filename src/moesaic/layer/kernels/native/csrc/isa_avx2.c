#include <stdint.h>

#define ISA_TABLE moesaic_isa_avx2
#define ISA_NAME "AVX2"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include "simd_avx2.h"
#include "kernels.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
#include "isa.h"
const moesaic_isa ISA_TABLE = {.name = ISA_NAME};
#endif
