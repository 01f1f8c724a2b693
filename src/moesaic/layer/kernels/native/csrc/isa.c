#include "isa.h"

#include <string.h>

extern const moesaic_isa moesaic_isa_avx512bf16, moesaic_isa_avx512, moesaic_isa_avx2, moesaic_isa_portable;

const moesaic_isa *moesaic_isa_now = &moesaic_isa_portable;

#if defined(__x86_64__)
static int has_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
static int has_avx512(void) {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
static int has_avx512bf16(void) { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#else
static int has_avx2(void) { return 0; }
static int has_avx512(void) { return 0; }
static int has_avx512bf16(void) { return 0; }
#endif

/* Takes the best instruction set, or the best that is not above the one named; returns the name of what it took. */
const char *moesaic_choose_isa(const char *at_most) {
    const moesaic_isa *known[] = {&moesaic_isa_avx512bf16, &moesaic_isa_avx512, &moesaic_isa_avx2, &moesaic_isa_portable};
    int (*has[])(void) = {has_avx512bf16, has_avx512, has_avx2};
    int allowed = at_most == 0;
    for (int i = 0; i < 4; i++) {
        allowed = allowed || strcmp(at_most, known[i]->name) == 0;
        if (allowed && known[i]->available && (i == 3 || has[i]())) {
            moesaic_isa_now = known[i];
            return known[i]->name;
        }
    }
    return 0;
}

/* What this library was built from; see sources.py. */
const char *moesaic_sources(void) { return MOESAIC_SOURCES; }
