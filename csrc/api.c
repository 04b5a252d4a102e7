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

int e45_head(const E45Norm *norm, const E45Matrix *m, const void *x, int64_t n, int64_t dtype, float *logits) {
    LOCKED(head(norm, m, x, n, dtype, logits));
}
