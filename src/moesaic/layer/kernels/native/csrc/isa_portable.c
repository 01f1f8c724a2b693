#include <stdint.h>

#define ISA_TABLE moesaic_isa_portable
#define ISA_NAME "portable"

#include "simd_portable.h"
#include "kernels.inc"
