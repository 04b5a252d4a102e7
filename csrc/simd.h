/* Vectors of VW 32-bit lanes, the same operations for each instruction set that the compiler is told of.
 * Nothing is contracted or reordered by the compiler (-ffp-contract=off): an operation here is one rounding. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX512VNNI__) && !defined(E45_ISA_AVX512)
#define E45_ISA_AVX512
#elif defined(__AVX2__) && !defined(E45_ISA_AVX2) && !defined(E45_ISA_AVX512)
#define E45_ISA_AVX2
#endif
#if defined(E45_ISA_AVX512) || defined(E45_ISA_AVX2)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

INLINE float from_bf16(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

INLINE uint16_t to_bf16(float x) { /* to the nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) return (uint16_t)(bits >> 16 | 64);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#if defined(E45_ISA_AVX512)

#define VW 16
typedef __m512 vf;
typedef __m512i vi;
INLINE vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void vf_store(float *p, vf x) { _mm512_storeu_ps(p, x); }
INLINE vf vf_set1(float x) { return _mm512_set1_ps(x); }
INLINE vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
INLINE vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
INLINE vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
INLINE vf vf_div(vf a, vf b) { return _mm512_div_ps(a, b); }
INLINE vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); }
INLINE vf vf_min(vf a, vf b) { return _mm512_min_ps(a, b); }
INLINE vf vf_abs(vf a) { return _mm512_abs_ps(a); }
INLINE vf vf_round(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE vi vi_load(const void *p) { return _mm512_loadu_si512(p); }
INLINE void vi_store(void *p, vi x) { _mm512_storeu_si512(p, x); }
INLINE vi vi_set1(int32_t x) { return _mm512_set1_epi32(x); }
INLINE vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
INLINE vi vi_and(vi a, vi b) { return _mm512_and_si512(a, b); }
INLINE vi vi_shift4(vi a) { return _mm512_srli_epi32(a, 4); }
INLINE vf vf_of_int(vi a) { return _mm512_cvtepi32_ps(a); }
INLINE vi vi_of_float(vf a) { return _mm512_cvtps_epi32(a); } /* to the nearest */
/* byte n of each lane, signed */
INLINE vi vi_byte(vi a, int n) { return _mm512_srai_epi32(_mm512_sllv_epi32(a, vi_set1(24 - 8 * n)), 24); }
INLINE vf vf_load_bf16(const uint16_t *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)), 16));
}
/* x · 2^n for whole n, -126 … 127 */
INLINE vf vf_scale2(vf x, vf n) {
    return _mm512_mul_ps(x, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), vi_set1(127)), 23)));
}
INLINE void vf_write_upper(uint16_t *p, vf x) { /* upper halves: bfloat16 towards 0 */
    _mm256_storeu_si256((void *)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(x), 16)));
}
INLINE void vf_write_bf16(uint16_t *p, vf x) { /* like to_bf16, but for numbers below 2^-126 */
#ifdef __AVX512BF16__
    _mm256_storeu_si256((void *)p, (__m256i)_mm512_cvtneps_pbh(x));
#else
    __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), vi_set1(1));
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, vi_set1(0x7fff)));
    bits = _mm512_mask_mov_epi32(bits, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), vi_set1(0x7fc00000));
    vf_write_upper(p, _mm512_castsi512_ps(bits));
#endif
}
INLINE void vi_write_i8(int8_t *p, vi x) { _mm_storeu_si128((void *)p, _mm512_cvtepi32_epi8(x)); }
INLINE int32_t vi_sum(vi x) { return _mm512_reduce_add_epi32(x); }
/* acc + sum over 4 bytes of w (0 … 255) · a (-128 … 127), in each lane */
INLINE vi dot4(vi acc, vi w, vi a) { return _mm512_dpbusd_epi32(acc, w, a); }
#define dot4_small dot4
#define INT8_ZERO 128 /* what dot4's w is too high by, for int8 codes */
INLINE vi int8_codes(vi w) { return w; }
/* acc + sum over 2 bfloat16 of w · a, in each lane */
INLINE vf dot2(vf acc, vi w, vi a) {
#ifdef __AVX512BF16__
    return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)a);
#else
    const vi high = vi_set1((int32_t)0xffff0000);
    acc = vf_fma(_mm512_castsi512_ps(_mm512_slli_epi32(w, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(a, 16)), acc);
    return vf_fma(_mm512_castsi512_ps(vi_and(w, high)), _mm512_castsi512_ps(vi_and(a, high)), acc);
#endif
}

#elif defined(E45_ISA_AVX2)

#define VW 8
typedef __m256 vf;
typedef __m256i vi;
INLINE vf vf_load(const float *p) { return _mm256_loadu_ps(p); }
INLINE void vf_store(float *p, vf x) { _mm256_storeu_ps(p, x); }
INLINE vf vf_set1(float x) { return _mm256_set1_ps(x); }
INLINE vf vf_add(vf a, vf b) { return _mm256_add_ps(a, b); }
INLINE vf vf_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
INLINE vf vf_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
INLINE vf vf_div(vf a, vf b) { return _mm256_div_ps(a, b); }
INLINE vf vf_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vf vf_max(vf a, vf b) { return _mm256_max_ps(a, b); }
INLINE vf vf_min(vf a, vf b) { return _mm256_min_ps(a, b); }
INLINE vf vf_abs(vf a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
INLINE vf vf_round(vf a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE vi vi_load(const void *p) { return _mm256_loadu_si256(p); }
INLINE void vi_store(void *p, vi x) { _mm256_storeu_si256(p, x); }
INLINE vi vi_set1(int32_t x) { return _mm256_set1_epi32(x); }
INLINE vi vi_add(vi a, vi b) { return _mm256_add_epi32(a, b); }
INLINE vi vi_and(vi a, vi b) { return _mm256_and_si256(a, b); }
INLINE vi vi_shift4(vi a) { return _mm256_srli_epi32(a, 4); }
INLINE vf vf_of_int(vi a) { return _mm256_cvtepi32_ps(a); }
INLINE vi vi_of_float(vf a) { return _mm256_cvtps_epi32(a); }
INLINE vi vi_byte(vi a, int n) { return _mm256_srai_epi32(_mm256_sllv_epi32(a, vi_set1(24 - 8 * n)), 24); }
INLINE vf vf_load_bf16(const uint16_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p)), 16));
}
INLINE vf vf_scale2(vf x, vf n) {
    return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), vi_set1(127)), 23)));
}
INLINE void vf_write_upper(uint16_t *p, vf x) {
    __m256i bits = _mm256_srli_epi32(_mm256_castps_si256(x), 16);
    bits = _mm256_permute4x64_epi64(_mm256_packus_epi32(bits, bits), 8);
    _mm_storeu_si128((void *)p, _mm256_castsi256_si128(bits));
}
INLINE void vf_write_bf16(uint16_t *p, vf x) {
    __m256i bits = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), vi_set1(1));
    bits = _mm256_add_epi32(bits, _mm256_add_epi32(odd, vi_set1(0x7fff)));
    __m256 is_nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    vf_write_upper(p, _mm256_blendv_ps(_mm256_castsi256_ps(bits), _mm256_castsi256_ps(vi_set1(0x7fc00000)), is_nan));
}
INLINE void vi_write_i8(int8_t *p, vi x) {
    int32_t lanes[VW];
    vi_store(lanes, x);
    for (int i = 0; i < VW; i++) p[i] = (int8_t)lanes[i];
}
INLINE int32_t vi_sum(vi x) {
    int32_t lanes[VW], sum = 0;
    vi_store(lanes, x);
    for (int i = 0; i < VW; i++) sum += lanes[i];
    return sum;
}
/* Sums of two products must fit 16 bits: w up to 128 in size. */
INLINE vi dot4(vi acc, vi w, vi a) { /* w and a -127 … 127 */
    vi pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(a, w));
    return vi_add(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
INLINE vi dot4_small(vi acc, vi w, vi a) { /* w 0 … 15 */
    return vi_add(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, a), _mm256_set1_epi16(1)));
}
#define INT8_ZERO 0
INLINE vi int8_codes(vi w) { return _mm256_xor_si256(w, vi_set1((int32_t)0x80808080)); }
INLINE vf dot2(vf acc, vi w, vi a) {
    const vi high = vi_set1((int32_t)0xffff0000);
    acc = vf_fma(_mm256_castsi256_ps(_mm256_slli_epi32(w, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), acc);
    return vf_fma(_mm256_castsi256_ps(vi_and(w, high)), _mm256_castsi256_ps(vi_and(a, high)), acc);
}

#else

/* Plain loops over lanes, which a compiler turns into what its machine has. */
#define VW 4
typedef struct { float lane[VW]; } vf;
typedef struct { int32_t lane[VW]; } vi;
#define LANES for (int i = 0; i < VW; i++)
INLINE vf vf_load(const float *p) { vf y; memcpy(&y, p, sizeof y); return y; }
INLINE void vf_store(float *p, vf x) { memcpy(p, &x, sizeof x); }
INLINE vf vf_set1(float x) { vf y; LANES y.lane[i] = x; return y; }
INLINE vf vf_add(vf a, vf b) { LANES a.lane[i] += b.lane[i]; return a; }
INLINE vf vf_sub(vf a, vf b) { LANES a.lane[i] -= b.lane[i]; return a; }
INLINE vf vf_mul(vf a, vf b) { LANES a.lane[i] *= b.lane[i]; return a; }
INLINE vf vf_div(vf a, vf b) { LANES a.lane[i] /= b.lane[i]; return a; }
#ifdef __FP_FAST_FMAF
INLINE vf vf_fma(vf a, vf b, vf c) { LANES c.lane[i] = __builtin_fmaf(a.lane[i], b.lane[i], c.lane[i]); return c; }
#else
INLINE vf vf_fma(vf a, vf b, vf c) { LANES c.lane[i] += a.lane[i] * b.lane[i]; return c; }
#endif
INLINE vf vf_max(vf a, vf b) { LANES a.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; return a; }
INLINE vf vf_min(vf a, vf b) { LANES a.lane[i] = a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; return a; }
INLINE vf vf_abs(vf a) { LANES a.lane[i] = __builtin_fabsf(a.lane[i]); return a; }
INLINE vf vf_round(vf a) { LANES a.lane[i] = __builtin_rintf(a.lane[i]); return a; }
INLINE vi vi_load(const void *p) { vi y; memcpy(&y, p, sizeof y); return y; }
INLINE void vi_store(void *p, vi x) { memcpy(p, &x, sizeof x); }
INLINE vi vi_set1(int32_t x) { vi y; LANES y.lane[i] = x; return y; }
INLINE vi vi_add(vi a, vi b) { LANES a.lane[i] += b.lane[i]; return a; }
INLINE vi vi_and(vi a, vi b) { LANES a.lane[i] &= b.lane[i]; return a; }
INLINE vi vi_shift4(vi a) { LANES a.lane[i] = (int32_t)((uint32_t)a.lane[i] >> 4); return a; }
INLINE vf vf_of_int(vi a) { vf y; LANES y.lane[i] = (float)a.lane[i]; return y; }
INLINE vi vi_of_float(vf a) { vi y; LANES y.lane[i] = (int32_t)__builtin_rintf(a.lane[i]); return y; }
INLINE vi vi_byte(vi a, int n) { LANES a.lane[i] = (int8_t)((uint32_t)a.lane[i] >> 8 * n); return a; }
INLINE vf vf_load_bf16(const uint16_t *p) { vf y; LANES y.lane[i] = from_bf16(p[i]); return y; }
INLINE vf vf_scale2(vf x, vf n) {
    LANES {
        uint32_t bits = (uint32_t)((int32_t)n.lane[i] + 127) << 23;
        float power;
        memcpy(&power, &bits, 4);
        x.lane[i] *= power;
    }
    return x;
}
INLINE void vf_write_upper(uint16_t *p, vf x) {
    uint32_t bits[VW];
    memcpy(bits, &x, sizeof bits);
    LANES p[i] = (uint16_t)(bits[i] >> 16);
}
INLINE void vf_write_bf16(uint16_t *p, vf x) { LANES p[i] = to_bf16(x.lane[i]); }
INLINE void vi_write_i8(int8_t *p, vi x) { LANES p[i] = (int8_t)x.lane[i]; }
INLINE int32_t vi_sum(vi x) { int32_t sum = 0; LANES sum += x.lane[i]; return sum; }
INLINE int32_t byte_of(int32_t x, int n) { return (int8_t)((uint32_t)x >> 8 * n); }
INLINE vi dot4(vi acc, vi w, vi a) {
    LANES for (int n = 0; n < 4; n++) acc.lane[i] += byte_of(w.lane[i], n) * byte_of(a.lane[i], n);
    return acc;
}
#define dot4_small dot4
#define INT8_ZERO 0
INLINE vi int8_codes(vi w) { LANES w.lane[i] ^= (int32_t)0x80808080; return w; }
INLINE vf dot2(vf acc, vi w, vi a) {
    vf wl, al, wh, ah;
    LANES {
        wl.lane[i] = from_bf16((uint16_t)w.lane[i]), al.lane[i] = from_bf16((uint16_t)a.lane[i]);
        wh.lane[i] = from_bf16((uint16_t)((uint32_t)w.lane[i] >> 16));
        ah.lane[i] = from_bf16((uint16_t)((uint32_t)a.lane[i] >> 16));
    }
    return vf_fma(wh, ah, vf_fma(wl, al, acc));
}

#endif

/* Of max and min, the second operand is what comes out where one is NaN.
 * e^x: 2^n · p(r) with n = round(x / ln 2), |r| <= ln 2 / 2, p the series to the seventh power; to about 2 last bits.
 * Below -87 it is e^-87 (1e-38), above 88 e^88. */
INLINE vf vf_exp(vf x) {
    x = vf_min(vf_set1(88.0f), vf_max(vf_set1(-87.0f), x));
    vf n = vf_round(vf_mul(x, vf_set1(1.44269504f)));
    vf r = vf_fma(n, vf_set1(-0.693359375f), x);
    r = vf_fma(n, vf_set1(2.12194440e-4f), r);
    vf p = vf_set1(1.0f / 5040);
    p = vf_fma(p, r, vf_set1(1.0f / 720));
    p = vf_fma(p, r, vf_set1(1.0f / 120));
    p = vf_fma(p, r, vf_set1(1.0f / 24));
    p = vf_fma(p, r, vf_set1(1.0f / 6));
    p = vf_fma(p, r, vf_set1(0.5f));
    p = vf_fma(p, r, vf_set1(1.0f));
    p = vf_fma(p, r, vf_set1(1.0f));
    return vf_scale2(p, n);
}

/* The sum of the lanes, halves first. */
INLINE float vf_sum(vf x) {
    float lanes[VW];
    vf_store(lanes, x);
    for (int half = VW / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

/* For attention. vf_first: lanes 0 … n - 1 of x, the others of `rest`. vf_top: the highest lane, none of them NaN.
 * vf_load_i8: VW codes. */
#if defined(E45_ISA_AVX512)
INLINE vf vf_first(vf x, int n, vf rest) { return _mm512_mask_blend_ps((__mmask16)((1u << n) - 1), rest, x); }
INLINE float vf_top(vf x) { return _mm512_reduce_max_ps(x); }
INLINE vf vf_load_i8(const int8_t *p) {
    return vf_of_int(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)p)));
}
#elif defined(E45_ISA_AVX2)
INLINE vf vf_first(vf x, int n, vf rest) {
    vi lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_blendv_ps(rest, x, _mm256_castsi256_ps(_mm256_cmpgt_epi32(vi_set1(n), lanes)));
}
INLINE float vf_top(vf x) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_shuffle_ps(half, half, 1)));
}
INLINE vf vf_load_i8(const int8_t *p) {
    return vf_of_int(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)p)));
}
#else
INLINE vf vf_first(vf x, int n, vf rest) { LANES x.lane[i] = i < n ? x.lane[i] : rest.lane[i]; return x; }
INLINE float vf_top(vf x) {
    float most = x.lane[0];
    LANES most = x.lane[i] > most ? x.lane[i] : most;
    return most;
}
INLINE vf vf_load_i8(const int8_t *p) { vf y; LANES y.lane[i] = (float)p[i]; return y; }
#endif
