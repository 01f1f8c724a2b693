#include <stdint.h>

#define ISA_TABLE moesaic_isa_avx512
#define ISA_NAME "AVX-512"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif
#include "simd_avx512.h"
#include "kernels.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
#include "isa.h"
const moesaic_isa ISA_TABLE = {.name = ISA_NAME};
#endif
