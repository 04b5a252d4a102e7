/* What attention does with a block of keys: products of its panels with rows, softmax. */
#pragma once
#include "ernie45.h"
#include "simd.h"

#define KEY_BLOCK 256 /* keys whose scores are held at once */
#define QUERY_TILE 16 /* tokens that go through a block together */
#define PRODUCT_WIDTH (2 * VW) /* dwords side by side in a product's panel */
#define PRODUCT_ROWS (VW == 16 ? 8 : 4) /* rows that share a loaded dword; all sums stay in registers */

static int64_t element_bytes(int64_t kind) { return kind == E45_F32 ? 4 : kind == E45_BF16 ? 2 : 1; }

typedef struct {
    uint16_t *widened;                     /* a block's keys or values as bfloat16, where the cache is I8 */
    float *key_scales, *value_scales;      /* [KEY_BLOCK]; the first with log2(e) / sqrt(D) */
    float *scores, *o, *l;                 /* [rows][KEY_BLOCK], [rows][D], [rows][VW]; rows are QUERY_TILE · G */
    float *m, *factors, *total_m, *total_l; /* [rows] */
} Scratch;

/* 2^x for x up to 0; below -126 it is 2^-126. NaN stays NaN. */
INLINE vf exp2_below(vf x) {
    x = vf_max(vf_set1(-126.0f), x);
    vf n = vf_round(x), r = vf_sub(x, n);
    vf p = vf_set1(1.54035304e-4f); /* the series of e^(r · ln 2) */
    p = vf_fma(p, r, vf_set1(1.33335581e-3f));
    p = vf_fma(p, r, vf_set1(9.61812911e-3f));
    p = vf_fma(p, r, vf_set1(5.55041087e-2f));
    p = vf_fma(p, r, vf_set1(2.40226507e-1f));
    p = vf_fma(p, r, vf_set1(6.93147181e-1f));
    p = vf_fma(p, r, vf_set1(1.0f));
    return vf_scale2(p, n);
}

INLINE float exp2_one(float x) {
    float lanes[VW];
    vf_store(lanes, exp2_below(vf_set1(x)));
    return lanes[0];
}

/* ---- products ---- */

/* out[r][0 … PRODUCT_WIDTH - 1] = out · factors[r] (0 without factors) + sum over steps of rows[r][step] · panel[step];
 * `odd` adds a step that takes the lower half of the panel's dwords only. Pitches and the panel's stride are in bytes.
 * Each step has the next 128 bytes from `ahead` on brought nearer, unless that is NULL. */
INLINE void product(const int num_rows, const int wide, const uint8_t *panel, int64_t stride, int64_t num_steps,
                    int odd, const uint8_t *rows, int64_t row_pitch, float *out, int64_t out_pitch,
                    const float *factors, const uint8_t *ahead) {
    vf acc[PRODUCT_ROWS][2];
#pragma GCC unroll 8
    for (int r = 0; r < num_rows; r++)
        for (int j = 0; j < 2; j++) {
            acc[r][j] = vf_set1(0.0f);
            if (factors) acc[r][j] = vf_mul(vf_load(out + r * out_pitch + j * VW), vf_set1(factors[r]));
        }
    for (int64_t step = 0; step < num_steps; step++) {
        const uint8_t *at = panel + step * stride;
        if (ahead) __builtin_prefetch(ahead + step * 128, 0, 2), __builtin_prefetch(ahead + step * 128 + 64, 0, 2);
#pragma GCC unroll 8
        for (int r = 0; r < num_rows; r++) {
            int32_t dword;
            memcpy(&dword, rows + r * row_pitch + step * 4, 4);
            if (wide) {
                float x;
                memcpy(&x, &dword, 4);
                acc[r][0] = vf_fma(vf_load((const float *)at), vf_set1(x), acc[r][0]);
                acc[r][1] = vf_fma(vf_load((const float *)at + VW), vf_set1(x), acc[r][1]);
            } else {
                acc[r][0] = dot2(acc[r][0], vi_load(at), vi_set1(dword));
                acc[r][1] = dot2(acc[r][1], vi_load(at + 4 * VW), vi_set1(dword));
            }
        }
    }
    if (odd)
        for (int r = 0; r < num_rows; r++) {
            int32_t dword;
            memcpy(&dword, rows + r * row_pitch + num_steps * 4, 4);
            for (int j = 0; j < 2; j++) {
                vi low = vi_and(vi_load(panel + num_steps * stride + j * 4 * VW), vi_set1(0xffff));
                acc[r][j] = dot2(acc[r][j], low, vi_set1(dword));
            }
        }
#pragma GCC unroll 8
    for (int r = 0; r < num_rows; r++)
        for (int j = 0; j < 2; j++) vf_store(out + r * out_pitch + j * VW, acc[r][j]);
}

#define PRODUCT_CASE(n) \
    case n: \
        if (wide) product(n, 1, panel, stride, num_steps, 0, rows, row_pitch, out, out_pitch, factors, ahead); \
        else product(n, 0, panel, stride, num_steps, odd, rows, row_pitch, out, out_pitch, factors, ahead); \
        break;

/* `product` of any number of rows. */
static void product_rows(int64_t num_rows, int wide, const uint8_t *panel, int64_t stride, int64_t num_steps, int odd,
                         const uint8_t *rows, int64_t row_pitch, float *out, int64_t out_pitch, const float *factors,
                         const uint8_t *ahead) {
    while (num_rows > 0) {
        int64_t n = num_rows < PRODUCT_ROWS ? num_rows : PRODUCT_ROWS;
        switch (n) {
            PRODUCT_CASE(1)
            PRODUCT_CASE(2)
            PRODUCT_CASE(3)
            PRODUCT_CASE(4)
#if VW == 16
            PRODUCT_CASE(5)
            PRODUCT_CASE(6)
            PRODUCT_CASE(7)
            PRODUCT_CASE(8)
#endif
        }
        num_rows -= n, rows += n * row_pitch, out += n * out_pitch;
        if (factors) factors += n;
        ahead = NULL;
    }
}

/* Codes of int8 as bfloat16, which holds them all. */
static void widen(const int8_t *codes, int64_t count, uint16_t *out) {
    for (int64_t i = 0; i < count; i += VW) vf_write_upper(out + i, vf_load_i8(codes + i));
}

/* ---- softmax ---- */

/* A row's scores of `num_keys` keys become 2^(x - m), as floats or (times the values' scales) as bfloat16, in place. */
INLINE void soften(const int wide, const int scaled, float *scores, int64_t num_keys, const Scratch *s, int64_t row) {
    vf top = vf_set1(-INFINITY);
    for (int64_t i = 0; i < num_keys; i += VW) {
        vf x = vf_mul(vf_load(scores + i), vf_load(s->key_scales + i));
        if (num_keys - i < VW) x = vf_first(x, (int)(num_keys - i), vf_set1(-INFINITY));
        top = vf_max(top, x);
    }
    float most = vf_top(top), m = s->m[row] > most ? s->m[row] : most;
    float factor = exp2_one(s->m[row] - m);
    vf l = vf_mul(vf_load(s->l + row * VW), vf_set1(factor));
    for (int64_t i = 0; i < num_keys; i += VW) {
        vf p = exp2_below(vf_fma(vf_load(scores + i), vf_load(s->key_scales + i), vf_set1(-m)));
        vf weight = scaled ? vf_mul(p, vf_load(s->value_scales + i)) : p;
        if (num_keys - i < VW) {
            p = vf_first(p, (int)(num_keys - i), vf_set1(0.0f));
            weight = vf_first(weight, (int)(num_keys - i), vf_set1(0.0f));
        }
        l = vf_add(l, p);
        if (wide) vf_store(scores + i, weight);
        else vf_write_bf16((uint16_t *)scores + i, weight);
    }
    vf_store(s->l + row * VW, l);
    s->m[row] = m, s->factors[row] = factor;
}

static void soften_row(int64_t kind, float *scores, int64_t num_keys, const Scratch *s, int64_t row) {
    if (kind == E45_F32) soften(1, 0, scores, num_keys, s, row);
    else if (kind == E45_BF16) soften(0, 0, scores, num_keys, s, row);
    else soften(0, 1, scores, num_keys, s, row);
}

/* Totals of a row += a span's. */
static void add_span(float *total_m, float *total_l, float *total, float m, float l, const float *o, int64_t head_dim) {
    float most = m > *total_m ? m : *total_m;
    float old_factor = exp2_one(*total_m - most), factor = exp2_one(m - most);
    *total_l = *total_l * old_factor + l * factor;
    *total_m = most;
    for (int64_t i = 0; i < head_dim; i += VW) {
        vf before = vf_mul(vf_load(total + i), vf_set1(old_factor));
        vf_store(total + i, vf_fma(vf_load(o + i), vf_set1(factor), before));
    }
}

static void divide(float *x, float divisor, int64_t count) {
    for (int64_t i = 0; i < count; i += VW) vf_store(x + i, vf_div(vf_load(x + i), vf_set1(divisor)));
}
