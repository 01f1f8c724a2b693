/* Vectors of 4 float32 in the compiler's own vector type: NEON on ARM, SSE on x86, plain code elsewhere. */
#include <math.h>
#include <string.h>

#define LANES 4
typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));

static inline vf vf_zero(void) { return (vf){0}; }
static inline vf vf_set(float a) { return (vf){a, a, a, a}; }
static inline vf vf_add(vf a, vf b) { return a + b; }
static inline vf vf_sub(vf a, vf b) { return a - b; }
static inline vf vf_mul(vf a, vf b) { return a * b; }
static inline vf vf_div(vf a, vf b) { return a / b; }
static inline vf vf_fma(vf a, vf b, vf c) { return a * b + c; }
static inline vf vf_select(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }
static inline vf vf_min(vf a, vf b) { return vf_select(a < b, a, b); }
static inline vf vf_max(vf a, vf b) { return vf_select(a > b, a, b); }
static inline vf vf_abs(vf a) { return (vf)((vi)a & 0x7fffffff); }
static inline vf vf_where_greater(vf a, vf b, vf v) { return vf_select(a > b, v, vf_zero()); }
static inline vf vf_sign_of(vf magnitude, vf sign) {
    vi mask = (vi)vf_set(-0.0f);
    return (vf)((mask & (vi)sign) | (~mask & (vi)magnitude));
}
static inline vf vf_round(vf a) {
    for (int i = 0; i < LANES; i++) a[i] = rintf(a[i]);
    return a;
}
static inline vf vf_scale(vf a, vf n) {
    for (int i = 0; i < LANES; i++) a[i] = ldexpf(a[i], (int)n[i]);
    return a;
}

static inline vf vf_load_f32(const float *p) {
    vf a;
    memcpy(&a, p, sizeof a);
    return a;
}
static inline void vf_store_f32(float *p, vf a) { memcpy(p, &a, sizeof a); }
static inline vf vf_load_bf16(const uint16_t *p) {
    vi bits = {p[0], p[1], p[2], p[3]};
    return (vf)(bits << 16);
}
static inline float half_to_float(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = (half >> 10) & 31, mantissa = half & 1023;
    float value;
    if (exponent == 0) {
        value = ldexpf((float)mantissa, -24);
    } else {
        uint32_t bits = (exponent == 31 ? 255u : exponent + 112u) << 23 | mantissa << 13;
        memcpy(&value, &bits, 4);
    }
    return sign ? -value : value;
}
static inline uint16_t float_to_half(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    float magnitude = fabsf(value);
    if (!(magnitude == magnitude)) return sign | 0x7e00;
    if (magnitude >= 65520.0f) return sign | 0x7c00;
    if (magnitude < 6.103515625e-05f) return sign | (uint16_t)rintf(ldexpf(magnitude, 24));
    memcpy(&bits, &magnitude, 4);
    bits += 0xfff + (bits >> 13 & 1);
    return sign | (uint16_t)((bits - (112u << 23)) >> 13);
}
static inline vf vf_load_f16(const uint16_t *p) {
    return (vf){half_to_float(p[0]), half_to_float(p[1]), half_to_float(p[2]), half_to_float(p[3])};
}
static inline void vf_store_f16(uint16_t *p, vf a) {
    for (int i = 0; i < LANES; i++) p[i] = float_to_half(a[i]);
}
static inline void vf_store_bf16(uint16_t *p, vf a) {
    for (int i = 0; i < LANES; i++) {
        uint32_t bits;
        float value = a[i];
        memcpy(&bits, &value, 4);
        p[i] = value == value ? (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : 0x7fc0;
    }
}

static inline float vf_sum(vf a) { return (a[0] + a[2]) + (a[1] + a[3]); }
static inline void vf_sum4(vf a, vf b, vf c, vf d, float *out) {
    out[0] = vf_sum(a);
    out[1] = vf_sum(b);
    out[2] = vf_sum(c);
    out[3] = vf_sum(d);
}
