/* Products of rows with a panel of weights: the inner loops of everything else.
 *
 * A tile is up to TILE_ROWS rows times the 64 outputs of a panel. Each of its sums goes through the columns in order,
 * alone in its lane: how many rows are in a tile changes nothing in any of them. */
#pragma once
#include <stdlib.h>

#include "ernie45.h"
#include "simd.h"

/* How many rows and vectors of outputs the registers hold the sums of. */
#if defined(E45_ISA_AVX512)
#define TILE_ROWS 6
#define WIDE 4      /* vectors at a time */
#define INT4_ROWS 3 /* of int4, whose sums are kept twice */
#elif defined(E45_ISA_AVX2)
#define TILE_ROWS 4
#define WIDE 2
#define INT4_ROWS 2
#else
#define TILE_ROWS 2
#define WIDE 4
#define INT4_ROWS 1
#endif
#define EACH _Pragma("GCC unroll 8") /* loops over registers */
#define BLOCK_STEPS 64 /* 16 KiB of a panel */
#define ROW_BLOCK 96   /* rows at a time, with their results on the stack */
#define STEP_BYTES (4 * E45_PANEL) /* one dword of each row of a panel */
#define CODES_BYTES(kind) ((kind) == E45_DENSE ? 2 : 1)

/* Rows in the form that a kind of matrix is multiplied with: bfloat16; int8 with a scale for the row; or int8 with a
 * scale for each group of columns. `offsets` are what sums begin with, for codes are stored too high by a constant. */
typedef struct {
    int64_t kind, width;
    uint8_t *codes;   /* [N][width · CODES_BYTES] */
    float *scales;    /* int8: [N]; int4: [N][width / 32] */
    int32_t *offsets; /* like scales */
} Inputs;

static inline int64_t scales_per_row(const Inputs *in) { return in->kind == E45_INT4 ? in->width / E45_GROUP : 1; }

static inline int64_t aligned(int64_t bytes) { return (bytes + 63) & ~(int64_t)63; }

/* A piece of the workspace: with `base` NULL it is only measured. */
typedef struct {
    char *base;
    int64_t used;
} Room;

static void *take(Room *room, int64_t bytes) {
    void *piece = room->base ? room->base + room->used : NULL;
    room->used += aligned(bytes);
    return piece;
}

static Inputs take_inputs(Room *room, int64_t kind, int64_t width, int64_t num_rows) {
    Inputs in = {.kind = kind, .width = width};
    in.codes = take(room, num_rows * width * CODES_BYTES(kind));
    if (kind != E45_DENSE) {
        in.scales = take(room, num_rows * scales_per_row(&in) * 4);
        in.offsets = take(room, num_rows * scales_per_row(&in) * 4);
    }
    return in;
}

/* Codes of x [n], n a multiple of VW, rounded by its largest value -> the scale; their sum is put into `sum`. */
INLINE float round_group(const float *x, int64_t n, int8_t *codes, int32_t *sum) {
    vf most = vf_set1(0), odd = vf_set1(0);
    for (int64_t k = 0; k < n; k += VW) {
        vf value = vf_load(x + k);
        most = vf_max(most, vf_abs(value));
        odd = vf_fma(value, vf_set1(0), odd); /* 0, or NaN where a value is not finite */
    }
    float scale = vf_top(most) / 127, nothing = vf_sum(odd);
    if (scale < 1e-30f) scale = 1e-30f;
    vf inverse = vf_set1(1 / scale);
    vi total = vi_set1(0);
    for (int64_t k = 0; k < n; k += VW) {
        vi rounded = vi_of_float(vf_mul(vf_load(x + k), inverse));
        vi_write_i8(codes + k, rounded);
        total = vi_add(total, rounded);
    }
    *sum = vi_sum(total);
    return scale + nothing;
}

/* Put row number `row`, x float32 [width], into its form. */
static void put_row(const Inputs *in, int64_t row, const float *x) {
    if (in->kind == E45_DENSE) {
        uint16_t *codes = (uint16_t *)in->codes + row * in->width;
        for (int64_t k = 0; k < in->width; k += VW) vf_write_bf16(codes + k, vf_load(x + k));
        return;
    }
    int8_t *codes = (int8_t *)in->codes + row * in->width;
    if (in->kind == E45_INT8) {
        int32_t sum;
        in->scales[row] = round_group(x, in->width, codes, &sum);
        in->offsets[row] = -INT8_ZERO * sum;
        return;
    }
    int64_t num_groups = in->width / E45_GROUP;
    for (int64_t g = 0; g < num_groups; g++) {
        int32_t sum;
        in->scales[row * num_groups + g] = round_group(x + g * E45_GROUP, E45_GROUP, codes + g * E45_GROUP, &sum);
        in->offsets[row * num_groups + g] = -8 * sum;
    }
}

typedef struct {
    const int32_t *codes[TILE_ROWS];
    const float *scales[TILE_ROWS];
    const int32_t *offsets[TILE_ROWS];
} TileRows;

INLINE void dense_tile(const int rows, const TileRows *in, const E45Matrix *m, int64_t panel, float out[][E45_PANEL]) {
    const int64_t num_steps = m->in_features / 2;
    for (int first = 0; first < E45_PANEL; first += WIDE * VW) {
        const uint8_t *w = m->panels + panel * num_steps * STEP_BYTES + first * 4;
        vf sums[TILE_ROWS][WIDE];
        EACH for (int r = 0; r < rows; r++)
            EACH for (int n = 0; n < WIDE; n++) sums[r][n] = vf_set1(0);
        for (int64_t step = 0; step < num_steps; step++, w += STEP_BYTES) {
            vi weights[WIDE];
            EACH for (int n = 0; n < WIDE; n++) weights[n] = vi_load(w + n * VW * 4);
            EACH for (int r = 0; r < rows; r++) {
                vi a = vi_set1(in->codes[r][step]);
                EACH for (int n = 0; n < WIDE; n++) sums[r][n] = dot2(sums[r][n], weights[n], a);
            }
        }
        EACH for (int r = 0; r < rows; r++)
            EACH for (int n = 0; n < WIDE; n++) vf_store(out[r] + first + n * VW, sums[r][n]);
    }
}

/* Dwords `from` to `to` of the columns; sums before them are in `out`, as integers, unless `from` is 0. */
INLINE void int8_tile(const int rows, const TileRows *in, const E45Matrix *m, int64_t panel, int64_t from, int64_t to,
                      float out[][E45_PANEL]) {
    const int64_t num_steps = m->in_features / 4;
    for (int first = 0; first < E45_PANEL; first += WIDE * VW) {
        const uint8_t *w = m->panels + (panel * num_steps + from) * STEP_BYTES + first * 4;
        vi sums[TILE_ROWS][WIDE];
        EACH for (int r = 0; r < rows; r++)
            EACH for (int n = 0; n < WIDE; n++)
                sums[r][n] = from ? vi_load(out[r] + first + n * VW) : vi_set1(in->offsets[r][0]);
        for (int64_t step = from; step < to; step++, w += STEP_BYTES) {
            vi weights[WIDE];
            EACH for (int n = 0; n < WIDE; n++) weights[n] = int8_codes(vi_load(w + n * VW * 4));
            EACH for (int r = 0; r < rows; r++) {
                vi a = vi_set1(in->codes[r][step]);
                EACH for (int n = 0; n < WIDE; n++) sums[r][n] = dot4(sums[r][n], weights[n], a);
            }
        }
        EACH for (int n = 0; n < WIDE; n++) {
            vf scale = vf_load(m->row_scales + panel * E45_PANEL + first + n * VW);
            EACH for (int r = 0; r < rows; r++) {
                float *sum = out[r] + first + n * VW;
                if (to < num_steps) vi_store(sum, sums[r][n]);
                else vf_store(sum, vf_mul(vf_of_int(sums[r][n]), vf_mul(vf_set1(in->scales[r][0]), scale)));
            }
        }
    }
}

/* Each run of four groups has its scales before it, so that a panel is one stream. */
INLINE void int4_tile(const int rows, const TileRows *in, const E45Matrix *m, int64_t panel, float out[][E45_PANEL]) {
    const int64_t num_groups = m->in_features / E45_GROUP;
    const vi low_half = vi_set1(0x0f0f0f0f);
    for (int first = 0; first < E45_PANEL; first += WIDE * VW) {
        const uint8_t *w = m->panels + panel * e45_int4_dwords(m->in_features) * STEP_BYTES + first * 4, *scales = w;
        vf sums[TILE_ROWS][WIDE];
        EACH for (int r = 0; r < rows; r++)
            EACH for (int n = 0; n < WIDE; n++) sums[r][n] = vf_set1(0);
        for (int64_t g = 0; g < num_groups; g++) {
            if (g % E45_RUN == 0) scales = w, w += STEP_BYTES;
            vi group[TILE_ROWS][WIDE];
            EACH for (int r = 0; r < rows; r++)
                EACH for (int n = 0; n < WIDE; n++) group[r][n] = vi_set1(in->offsets[r][g]);
            for (int step = 0; step < 4; step++, w += STEP_BYTES) {
                vi low[WIDE], high[WIDE];
                EACH for (int n = 0; n < WIDE; n++) {
                    vi both = vi_load(w + n * VW * 4);
                    low[n] = vi_and(both, low_half);
                    high[n] = vi_and(vi_shift4(both), low_half);
                }
                EACH for (int r = 0; r < rows; r++) {
                    vi a = vi_set1(in->codes[r][g * 8 + step]);
                    EACH for (int n = 0; n < WIDE; n++) group[r][n] = dot4_small(group[r][n], low[n], a);
                    vi b = vi_set1(in->codes[r][g * 8 + 4 + step]);
                    EACH for (int n = 0; n < WIDE; n++) group[r][n] = dot4_small(group[r][n], high[n], b);
                }
            }
            EACH for (int n = 0; n < WIDE; n++) {
                vf scale = vf_of_int(vi_byte(vi_load(scales + n * VW * 4), (int)(g % E45_RUN)));
                EACH for (int r = 0; r < rows; r++)
                    sums[r][n] = vf_fma(vf_of_int(group[r][n]), vf_mul(vf_set1(in->scales[r][g]), scale), sums[r][n]);
            }
        }
        EACH for (int n = 0; n < WIDE; n++) {
            vf scale = vf_load(m->row_scales + panel * E45_PANEL + first + n * VW);
            EACH for (int r = 0; r < rows; r++) vf_store(out[r] + first + n * VW, vf_mul(sums[r][n], scale));
        }
    }
}

INLINE void tile_of(const int rows, const TileRows *in, const E45Matrix *m, int64_t panel, int64_t from, int64_t to,
                    float out[][E45_PANEL]) {
    if (m->kind == E45_DENSE) dense_tile(rows, in, m, panel, out);
    else if (m->kind == E45_INT8) int8_tile(rows, in, m, panel, from, to, out);
    else if (rows <= INT4_ROWS) int4_tile(rows, in, m, panel, out);
}

static __attribute__((noinline)) void tile(int64_t rows, const TileRows *in, const E45Matrix *m, int64_t panel,
                                           int64_t from, int64_t to, float out[][E45_PANEL]) {
    switch (rows) {
    case 1: tile_of(1, in, m, panel, from, to, out); break;
    case 2: tile_of(2, in, m, panel, from, to, out); break;
#if TILE_ROWS > 2
    case 3: tile_of(3, in, m, panel, from, to, out); break;
    case 4: tile_of(4, in, m, panel, from, to, out); break;
#endif
#if TILE_ROWS > 4
    case 5: tile_of(5, in, m, panel, from, to, out); break;
    case 6: tile_of(6, in, m, panel, from, to, out); break;
#endif
    }
}

/* One panel's outputs, without the bias, for `count` rows: those numbered in `numbers`, or from `first` on. */
static void multiply(const E45Matrix *m, int64_t panel, const Inputs *in, const int64_t *numbers, int64_t first,
                     int64_t count, float out[][E45_PANEL]) {
    const int64_t row_bytes = in->width * CODES_BYTES(in->kind), num_scales = scales_per_row(in);
    const int64_t most = m->kind == E45_INT4 ? INT4_ROWS : TILE_ROWS;
    /* With many rows, int8 is bound by how fast weights come from the second cache: some columns of a panel go through
     * all rows while they are in the first. */
    const int64_t num_steps = m->in_features / 4;
    const int64_t block = m->kind == E45_INT8 && count > TILE_ROWS ? BLOCK_STEPS : num_steps;
    for (int64_t from = 0; from < num_steps; from += block) {
        int64_t to = from + block < num_steps ? from + block : num_steps;
        for (int64_t done = 0; done < count; done += most) {
            int64_t rows = count - done < most ? count - done : most;
            TileRows tile_rows;
            for (int64_t i = 0; i < rows; i++) {
                int64_t row = numbers ? numbers[first + done + i] : first + done + i;
                tile_rows.codes[i] = (const int32_t *)(in->codes + row * row_bytes);
                tile_rows.scales[i] = in->scales + row * num_scales;
                tile_rows.offsets[i] = in->offsets + row * num_scales;
            }
            tile(rows, &tile_rows, m, panel, from, to, out + done);
        }
    }
}
