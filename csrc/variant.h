/* What kernels.c gives for one instruction set; api.c chooses among them. */
#pragma once
#include "ernie45.h"

typedef struct {
    const char *name;
    int (*linear)(const E45Matrix *, const void *, int64_t, void *, int64_t);
    int (*lookup)(const E45Matrix *, const int64_t *, int64_t, void *, int64_t);
    int (*attention)(const E45Attention *, const E45Batch *, const E45KV *, void *, int64_t);
    int (*mlp)(const E45Norm *, const E45Mlp *, void *, int64_t, int64_t);
    int (*route)(const E45Norm *, const E45Router *, const void *, int64_t, int64_t, int64_t *, float *);
    int (*experts)(const E45Norm *, const E45Mlp *const *, const E45Part *, const E45Mlp *, const int64_t *, const float *,
                   int64_t, void *, int64_t, int64_t);
    int (*add_outputs)(const float *, int64_t, const int64_t *, const float *, int64_t, void *, int64_t, int64_t, int64_t);
    int (*layers)(const E45Layer *, const E45KV *, int64_t, const E45Batch *, void *, int64_t);
    int (*head)(const E45Norm *, const E45Matrix *, const void *, int64_t, int64_t, float *);
} Variant;

extern const Variant variant_avx512bf16, variant_avx512vnni, variant_avx2, variant_portable;
