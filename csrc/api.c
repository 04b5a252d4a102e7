/* The entry points: they choose the instruction set, and let one call run at a time. */
#include <stdlib.h>
#include <string.h>

#include "ernie45.h"
#include "pool.h"
#include "variant.h"

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
    for (int64_t block = 0; block < n; block += 16)
        for (int64_t row = 0; row < E45_PANEL; row++)
            for (int64_t dword = block; dword < block + 16 && dword < n; dword++)
                place[dword * E45_PANEL + row] = copy[row * n + dword] ^ panels->flip;
    free(copy);
}

int e45_make_panels(void *rows, int64_t num_panels, int64_t num_dwords, int64_t flip) {
    Panels panels = {rows, num_dwords, (uint32_t)flip * 0x01010101u, 0};
    pool_lock();
    pool_run(make_panel, &panels, num_panels);
    pool_unlock();
    return panels.failed;
}

typedef struct {
    const uint8_t *codes;
    const int8_t *scales;
    int64_t num_rows, in_features;
    uint32_t *panels;
} Int4Panels;

static void make_int4_panel(void *context, int64_t panel) {
    const Int4Panels *all = context;
    const int64_t num_groups = all->in_features / E45_GROUP;
    uint32_t *place = all->panels + panel * e45_int4_dwords(all->in_features) * E45_PANEL;
    for (int64_t g = 0; g < num_groups; g += E45_RUN) {
        const int64_t count = num_groups - g < E45_RUN ? num_groups - g : E45_RUN;
        for (int64_t lane = 0; lane < E45_PANEL; lane++) {
            const int64_t row = panel * E45_PANEL + lane;
            uint32_t dwords[1 + 4 * E45_RUN] = {0};
            if (row < all->num_rows) {
                memcpy(dwords, all->scales + row * num_groups + g, (size_t)count);
                memcpy(dwords + 1, all->codes + (row * num_groups + g) * E45_GROUP / 2, (size_t)count * E45_GROUP / 2);
            }
            for (int64_t dword = 0; dword < 1 + 4 * count; dword++) place[dword * E45_PANEL + lane] = dwords[dword];
        }
        place += (1 + 4 * count) * E45_PANEL;
    }
}

int e45_make_int4_panels(const uint8_t *codes, const int8_t *scales, int64_t num_rows, int64_t in_features,
                         void *panels) {
    Int4Panels all = {codes, scales, num_rows, in_features, panels};
    pool_lock();
    pool_run(make_int4_panel, &all, (num_rows + E45_PANEL - 1) / E45_PANEL);
    pool_unlock();
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

int e45_experts(const E45Norm *norm, const E45Mlp *const *experts, int64_t num_experts, const E45Mlp *shared,
                const int64_t *chosen, const float *shares, int64_t num_chosen, void *x, int64_t n, int64_t dtype) {
    LOCKED(experts(norm, experts, num_experts, shared, chosen, shares, num_chosen, x, n, dtype));
}

int e45_layers(const E45Layer *list, const E45KV *kv, int64_t n, const E45Batch *batch, void *x, int64_t dtype) {
    LOCKED(layers(list, kv, n, batch, x, dtype));
}

int e45_head(const E45Norm *norm, const E45Matrix *m, const void *x, int64_t n, int64_t dtype, float *logits) {
    LOCKED(head(norm, m, x, n, dtype, logits));
}
