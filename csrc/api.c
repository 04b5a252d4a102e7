/* The entry points: they choose the instruction set, and let one call run at a time. */
#include <stdlib.h>
#include <string.h>

#include "ernie45.h"
#include "pool.h"
#include "variant.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#define NUM_VARIANTS ((int)(sizeof variants / sizeof *variants))

static const Variant *const variants[] = {
#ifdef E45_HAVE_X86
    &variant_avx512bf16, &variant_avx512vnni, &variant_avx2,
#endif
    &variant_portable,
};
static const Variant *used;

static int runs_here(const Variant *variant) {
#ifdef E45_HAVE_X86
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    int vnni = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vnni");
    if (variant == &variant_avx512bf16) return vnni && __builtin_cpu_supports("avx512bf16");
    if (variant == &variant_avx512vnni) return vnni;
    if (variant == &variant_avx2) return avx2;
#endif
    return variant == &variant_portable;
}

static const Variant *variant(void) {
    for (int i = 0; !used; i++)
        if (runs_here(variants[i])) used = variants[i];
    return used;
}

int e45_version(void) { return E45_VERSION; }

const char *e45_isa(void) { return variant()->name; }

const char *e45_isas(void) {
    static char names[128];
    char found[sizeof names] = "";
    for (int i = 0; i < NUM_VARIANTS; i++) {
        if (!runs_here(variants[i])) continue;
        if (*found) strcat(found, ",");
        strcat(found, variants[i]->name);
    }
    return strcpy(names, found);
}

int e45_use_isa(const char *name) {
    for (int i = 0; i < NUM_VARIANTS; i++) {
        if (strcmp(variants[i]->name, name) || !runs_here(variants[i])) continue;
        pool_lock();
        used = variants[i];
        pool_unlock();
        return 0;
    }
    return -1;
}

int e45_set_threads(int num_threads) {
    pool_lock();
    int failed = pool_set_threads(num_threads);
    pool_unlock();
    return failed;
}

int64_t e45_workspace_bytes(void) {
    pool_lock();
    int64_t bytes = pool_workspace_bytes();
    pool_unlock();
    return bytes;
}

void e45_trim(void) {
    pool_lock();
    pool_free_workspace();
    pool_end();
    pool_unlock();
}

static _Thread_local int alone;

void e45_work_alone(void) { alone = 1; }

static void run(PoolTask task, void *context, int64_t num_tasks) {
    if (!alone) pool_lock(), pool_run(task, context, num_tasks), pool_unlock();
    else
        for (int64_t i = 0; i < num_tasks; i++) task(context, i);
}

#define AHEAD_DWORDS 64 /* of a row, that are asked for before they are needed */
#define LANES 4 /* rows whose dwords change places with one another at a time */

typedef uint32_t Lanes __attribute__((vector_size(4 * LANES)));

#if defined(__clang__) /* GCC has this from version 12 on only */
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (Lanes){__VA_ARGS__})
#endif

/* Four dwords of each of four rows, `from_stride` dwords apart -> each dword of all four rows, side by side. */
static inline void transpose_lanes(const uint32_t *from, int64_t from_stride, Lanes columns[LANES]) {
    Lanes rows[LANES], pairs[LANES];
    for (int i = 0; i < LANES; i++) memcpy(&rows[i], from + i * from_stride, sizeof rows[i]);
    for (int i = 0; i < 2; i++) {
        pairs[2 * i] = SHUFFLE(rows[i], rows[i + 2], 0, 4, 1, 5);
        pairs[2 * i + 1] = SHUFFLE(rows[i], rows[i + 2], 2, 6, 3, 7);
    }
    for (int i = 0; i < 2; i++) {
        columns[2 * i] = SHUFFLE(pairs[i], pairs[i + 2], 0, 4, 1, 5);
        columns[2 * i + 1] = SHUFFLE(pairs[i], pairs[i + 2], 2, 6, 3, 7);
    }
}

/* To memory that nobody reads soon: not by way of the caches, which would first read what lies there. */
static inline void stream_lanes(uint32_t *to, Lanes lanes) {
#if defined(__SSE2__)
    _mm_stream_si128((__m128i *)to, (__m128i)lanes);
#else
    memcpy(to, &lanes, sizeof lanes);
#endif
}

typedef struct {
    uint8_t *rows;
    int64_t num_dwords;
    uint32_t flip;
    int failed;
} Panels;

static void make_panel(void *context, int64_t panel) {
    Panels *panels = context;
    const int64_t n = panels->num_dwords;
    uint32_t *place = (uint32_t *)(panels->rows + panel * n * 4 * E45_PANEL);
    uint32_t *copy = aligned_alloc(64, (size_t)n * 4 * E45_PANEL);
    if (!copy) {
        panels->failed = -1;
        return;
    }
    memcpy(copy, place, (size_t)n * 4 * E45_PANEL);
    /* Squares of 64 by 16 dwords: both sides of a copy stay in the first cache. */
    const int64_t whole = n / LANES * LANES;
    for (int64_t block = 0; block < whole; block += 16)
        for (int64_t row = 0; row < E45_PANEL; row += LANES)
            for (int64_t dword = block; dword < block + 16 && dword < whole; dword += LANES) {
                Lanes columns[LANES];
                transpose_lanes(copy + row * n + dword, n, columns);
                for (int i = 0; i < LANES; i++) {
                    columns[i] ^= panels->flip;
                    memcpy(place + (dword + i) * E45_PANEL + row, &columns[i], sizeof columns[i]);
                }
            }
    for (int64_t dword = whole; dword < n; dword++)
        for (int64_t row = 0; row < E45_PANEL; row++) place[dword * E45_PANEL + row] = copy[row * n + dword] ^ panels->flip;
    free(copy);
}

int e45_make_panels(void *rows, int64_t num_panels, int64_t num_dwords, int64_t flip) {
    Panels panels = {rows, num_dwords, (uint32_t)flip * 0x01010101u, 0};
    run(make_panel, &panels, num_panels);
    return panels.failed;
}

typedef struct {
    const uint8_t *codes;
    const int8_t *scales;
    int64_t num_rows, in_features;
    uint32_t *panels;
} Int4Panels;

/* Four groups and their scales, `num_dwords` of codes from each row, `stride` dwords apart, of 64 rows. */
static void make_int4_run(const uint32_t *codes, int64_t stride, const uint32_t scales[E45_PANEL], int64_t num_dwords,
                          uint32_t *place) {
    for (int64_t lane = 0; lane < E45_PANEL; lane += LANES) {
        Lanes some;
        memcpy(&some, scales + lane, sizeof some);
        stream_lanes(place + lane, some);
    }
    place += E45_PANEL;
    /* A line of the cache, 16 lanes, is written at once. */
    for (int64_t line = 0; line < E45_PANEL; line += 16)
        for (int64_t dword = 0; dword < num_dwords; dword += LANES)
            for (int64_t lane = line; lane < line + 16; lane += LANES) {
                Lanes columns[LANES];
                transpose_lanes(codes + lane * stride + dword, stride, columns);
                for (int i = 0; i < LANES; i++) stream_lanes(place + (dword + i) * E45_PANEL + lane, columns[i]);
            }
}

static void make_int4_panel(void *context, int64_t panel) {
    const Int4Panels *all = context;
    const int64_t num_groups = all->in_features / E45_GROUP, group_dwords = E45_GROUP / 8;
    uint32_t *place = all->panels + panel * e45_int4_dwords(all->in_features) * E45_PANEL;
    const int64_t first = panel * E45_PANEL, left = all->num_rows - first, num_rows = left < E45_PANEL ? left : E45_PANEL;
    uint32_t edge[E45_PANEL][E45_RUN * E45_GROUP / 8]; /* of a panel that the matrix ends in */
    memset(edge, 0, sizeof edge);
    for (int64_t g = 0; g < num_groups; g += E45_RUN) {
        const int64_t count = num_groups - g < E45_RUN ? num_groups - g : E45_RUN, num_dwords = count * group_dwords;
        const uint32_t *codes = (const uint32_t *)all->codes + (first * num_groups + g) * group_dwords;
        int64_t stride = num_groups * group_dwords;
        uint32_t scales[E45_PANEL] = {0};
        for (int64_t lane = 0; lane < num_rows; lane++)
            memcpy(&scales[lane], all->scales + (first + lane) * num_groups + g, (size_t)count);
        /* 64 rows are more than the processor follows by itself. */
        for (int64_t lane = 0; lane < num_rows; lane++) __builtin_prefetch(codes + lane * stride + AHEAD_DWORDS, 0, 2);
        if (num_rows < E45_PANEL) {
            for (int64_t lane = 0; lane < num_rows; lane++)
                memcpy(edge[lane], codes + lane * stride, (size_t)num_dwords * 4);
            codes = edge[0], stride = E45_RUN * E45_GROUP / 8;
        }
        make_int4_run(codes, stride, scales, num_dwords, place);
        place += (1 + num_dwords) * E45_PANEL;
    }
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

int e45_make_int4_panels(const uint8_t *codes, const int8_t *scales, int64_t num_rows, int64_t in_features,
                         void *panels) {
    Int4Panels all = {codes, scales, num_rows, in_features, panels};
    run(make_int4_panel, &all, (num_rows + E45_PANEL - 1) / E45_PANEL);
    return 0;
}

#define LOCKED(call)                    \
    do {                                \
        pool_lock();                    \
        int failed = variant()->call;   \
        pool_unlock();                  \
        return failed;                  \
    } while (0)

int e45_linear(const E45Matrix *m, const void *x, int64_t n, void *y, int64_t dtype) {
    LOCKED(linear(m, x, n, y, dtype));
}

int e45_lookup(const E45Matrix *m, const int64_t *ids, int64_t n, void *y, int64_t dtype) {
    LOCKED(lookup(m, ids, n, y, dtype));
}

int e45_attention(const E45Attention *a, const E45Batch *batch, const E45KV *kv, void *x, int64_t dtype) {
    LOCKED(attention(a, batch, kv, x, dtype));
}

int e45_mlp(const E45Norm *norm, const E45Mlp *mlp, void *x, int64_t n, int64_t dtype) {
    LOCKED(mlp(norm, mlp, x, n, dtype));
}

int e45_route(const E45Norm *norm, const E45Router *router, const void *x, int64_t n, int64_t dtype, int64_t *chosen,
              float *shares) {
    LOCKED(route(norm, router, x, n, dtype, chosen, shares));
}

int e45_experts(const E45Norm *norm, const E45Mlp *const *experts, const E45Part *part, const E45Mlp *shared,
                const int64_t *chosen, const float *shares, int64_t num_chosen, void *x, int64_t n, int64_t dtype) {
    LOCKED(experts(norm, experts, part, shared, chosen, shares, num_chosen, x, n, dtype));
}

int e45_add_outputs(const float *outputs, int64_t has_shared, const int64_t *chosen, const float *shares,
                    int64_t num_chosen, void *x, int64_t n, int64_t width, int64_t dtype) {
    LOCKED(add_outputs(outputs, has_shared, chosen, shares, num_chosen, x, n, width, dtype));
}

int e45_layers(const E45Layer *list, const E45KV *kv, int64_t n, const E45Batch *batch, void *x, int64_t dtype) {
    LOCKED(layers(list, kv, n, batch, x, dtype));
}

int e45_head(const E45Norm *norm, const E45Matrix *m, const void *x, int64_t n, int64_t dtype, float *logits) {
    LOCKED(head(norm, m, x, n, dtype, logits));
}
