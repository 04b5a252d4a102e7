/* The C interface of the native kernels: plain structs and pointers, called from Python by ctypes.
 *
 * Whatever the number of rows, a row's sums are always made in one order, so that its bits do not depend on the rows
 * beside it. Shape letters: N tokens, h hidden size, H query heads, Hkv key/value heads, D head width, I MLP width,
 * E experts, K chosen experts, V vocabulary, S tokens of a sequence so far.
 */
#pragma once
#include <stdint.h>

#define E45_VERSION 4
#define E45_PANEL 64 /* outputs whose weights lie side by side */
#define E45_GROUP 32 /* columns that share a scale in int4 */
#define E45_RUN 4    /* groups whose scales are one dword */
#define E45_KV_BLOCK 32 /* tokens whose keys lie side by side */

enum { E45_F32, E45_BF16, E45_I8 };        /* what a number is stored as */
enum { E45_DENSE, E45_INT8, E45_INT4 };    /* how a matrix is stored: bfloat16, int8, int4 */

/* A weight matrix in panels of 64 outputs. In a panel, dword q of each of its 64 rows lies side by side (256 bytes),
 * then dword q + 1: a dword is 2 bfloat16, 4 int8 codes (with 128 added), or 4 bytes of 4-bit codes, in which byte j of
 * a group of 32 columns holds column j low and column j + 16 high. Before each four groups of int4 is a dword of their
 * scales, a signed byte each. `in_features` is a multiple of 32; the last panel has 64 rows, too, whatever is in those
 * beyond `out_features`. */
typedef struct {
    int64_t kind, out_features, in_features;
    const uint8_t *panels;
    const float *row_scales; /* int8 and int4: [panels · 64] */
    const float *bias;       /* [out_features], or NULL */
} E45Matrix;

/* Of an int4 row, with the scales of its groups. */
static inline int64_t e45_int4_dwords(int64_t in_features) {
    const int64_t num_groups = in_features / E45_GROUP;
    return num_groups * 4 + (num_groups + E45_RUN - 1) / E45_RUN;
}

typedef struct {
    const float *weight; /* [h] */
    float eps;
} E45Norm;

typedef struct {
    E45Norm norm;
    E45Matrix qkv, out;
    int64_t num_heads, num_kv_heads, head_dim;
} E45Attention;

/* The tokens of a step: `num_rows` runs of tokens, one after the other. */
typedef struct {
    int64_t num_tokens, num_rows;
    const int64_t *slots, *starts, *counts; /* [num_rows]: a run's KV slot, its first position, its tokens */
    const float *cos, *sin;                 /* [num_tokens][D / 2] */
} E45Batch;

/* One layer's keys and values, each [slots][Hkv][context_tokens / 32] blocks of 32 tokens, of `kind` (F32, BF16 or I8).
 * A block's keys are [D / 2][32][2], pairs of neighbours of each key, its values [16][D][2], pairs of tokens of each
 * column; F32 has no pairs: [D][32] and [32][D]. I8 also has scales in bfloat16 [slots][Hkv][context_tokens]. Whatever
 * nobody wrote may be there. */
typedef struct {
    int64_t kind, context_tokens;
    void *keys, *values;
    uint16_t *key_scales, *value_scales;
} E45KV;

/* SwiGLU: `gate_up` [2·I, h] has the gate half first; I is a multiple of 64. */
typedef struct {
    E45Matrix gate_up, down;
} E45Mlp;

/* K of E experts: highest softmax(x · weightᵀ) + correction; shares are the probabilities over their sum, or over
 * `norm_min` where that is more. */
typedef struct {
    const float *weight, *correction; /* [E][width]; [E] or NULL */
    int64_t num_experts, width, num_chosen;
    float norm_min;
} E45Router;

/* The experts that a call is for: all of them, `numbers` and `outputs` being NULL, or some, where not all are in memory
 * at once. What these and the shared MLP give is then kept in `outputs` [N · K + N][h], in the order of the choices and
 * then of the tokens, until all are there to be added up. */
typedef struct {
    const int64_t *numbers; /* [count], or NULL for 0 to count - 1 */
    int64_t count;
    float *outputs;
} E45Part;

/* A layer: attention, then experts or a dense MLP. */
typedef struct {
    E45Attention attention;
    E45Norm norm;
    const E45Router *router;      /* NULL without experts */
    const E45Mlp *const *experts; /* [E] */
    const E45Mlp *shared;         /* the experts' shared MLP, or NULL; without experts the layer's only one */
} E45Layer;

#ifdef __cplusplus
extern "C" {
#endif
#define E45_API __attribute__((visibility("default")))

E45_API int e45_version(void);
E45_API const char *e45_isa(void);            /* the instruction set in use */
E45_API const char *e45_isas(void);           /* those this machine can run, best first, with commas */
E45_API int e45_use_isa(const char *name);    /* 0, or -1 if it is not one of those */
E45_API int e45_set_threads(int num_threads); /* of the pool, the caller's included; 0, or -1 */
E45_API int64_t e45_workspace_bytes(void);    /* kept between calls for intermediate values */
E45_API void e45_trim(void);                  /* gives them back, and ends the pool's threads */

/* The calling thread makes panels by itself from now on, beside what others compute. */
E45_API void e45_work_alone(void);

/* `rows` [n · 64] of `num_dwords` dwords each -> panels, in place; every byte is XORed with `flip`. */
E45_API int e45_make_panels(void *rows, int64_t num_panels, int64_t num_dwords, int64_t flip);
/* Of int4 rows the codes [N][in_features / 2] and scales [N][in_features / 32] -> panels, which begin at a multiple of
 * 16 bytes, filled up with zeros. */
E45_API int e45_make_int4_panels(const uint8_t *codes, const int8_t *scales, int64_t num_rows, int64_t in_features,
                                 void *panels);

/* All of the following return 0, or -1 where memory is short. x and y are [N, ·] of `dtype` (F32 or BF16). */
E45_API int e45_linear(const E45Matrix *, const void *x, int64_t num_tokens, void *y, int64_t dtype);
E45_API int e45_lookup(const E45Matrix *, const int64_t *ids, int64_t num_tokens, void *y, int64_t dtype);
/* x += attention(norm(x)), with the new keys and values written to their slots first. */
E45_API int e45_attention(const E45Attention *, const E45Batch *, const E45KV *, void *x, int64_t dtype);
/* x += mlp(norm(x)) */
E45_API int e45_mlp(const E45Norm *, const E45Mlp *, void *x, int64_t num_tokens, int64_t dtype);
/* chosen [N, K] and shares [N, K] of norm(x) */
E45_API int e45_route(const E45Norm *, const E45Router *, const void *x, int64_t num_tokens, int64_t dtype,
                      int64_t *chosen, float *shares);
/* x += sum of shares · experts[chosen](norm(x)) + shared(norm(x)); `shared` may be NULL. Of the table [E] only chosen
 * experts of the part are read. With its `outputs` x is not changed. */
E45_API int e45_experts(const E45Norm *, const E45Mlp *const *experts, const E45Part *, const E45Mlp *shared,
                        const int64_t *chosen, const float *shares, int64_t num_chosen, void *x, int64_t num_tokens,
                        int64_t dtype);
/* The same sum, of the outputs of all chosen experts, and of a shared MLP if `has_shared`: with the same bits. */
E45_API int e45_add_outputs(const float *outputs, int64_t has_shared, const int64_t *chosen, const float *shares,
                            int64_t num_chosen, void *x, int64_t num_tokens, int64_t width, int64_t dtype);
/* `num_layers` layers one after the other: x += attention(norm(x)), x += mlp(norm(x)); `kv` has one for each. */
E45_API int e45_layers(const E45Layer *, const E45KV *kv, int64_t num_layers, const E45Batch *, void *x, int64_t dtype);
/* logits float32 [N, V] of norm(x) */
E45_API int e45_head(const E45Norm *, const E45Matrix *, const void *x, int64_t num_tokens, int64_t dtype,
                     float *logits);
#ifdef __cplusplus
}
#endif
