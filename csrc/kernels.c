/* The parts of a decoder's layers, compiled once for each instruction set: each entry point is a row of phases. */
#include "attention.h"
#include "mlp.h"
#include "phases.h"
#include "variant.h"

static int attention(const E45Attention *a, const E45Batch *batch, const E45KV *kv, void *x, int64_t dtype) {
    const int64_t n = batch->num_tokens, seen = a->num_heads * a->head_dim;
    Product qkv = {.m = &a->qkv, .num_rows = n, .dtype = E45_F32};
    Product out = {.m = &a->out, .num_rows = n, .y = x, .dtype = dtype, .adds = 1};
    float *mixed;
    void *workspace;
    if (!n) return 0;
    for (Room room = {0};; room = (Room){pool_workspace(room.used), 0}) {
        qkv.in = take_inputs(&room, a->qkv.kind, a->qkv.in_features, n);
        qkv.y = take(&room, n * a->qkv.out_features * 4);
        mixed = take(&room, n * seen * 4);
        out.in = take_inputs(&room, a->out.kind, a->out.in_features, n);
        workspace = take(&room, attend_bytes(a, batch, kv));
        if (room.base) break;
        if (!pool_workspace(room.used)) return -1;
    }
    Preparing first = {.norm = &a->norm, .x = x, .dtype = dtype, .width = a->qkv.in_features, .in = {&qkv.in}};
    pool_run(prepare_row, &first, n);
    run_product(&qkv);
    attend(a, batch, kv, qkv.y, mixed, workspace);
    Preparing second = {.x = mixed, .dtype = E45_F32, .width = seen, .in = {&out.in}};
    pool_run(prepare_row, &second, n);
    run_product(&out);
    return 0;
}

typedef struct {
    const E45Norm *norm;
    const E45Router *router;
    const void *x;
    int64_t dtype, parts; /* of the experts, each a task */
    float *logits;        /* [N][E] */
    int64_t *chosen;
    float *shares;
} Routing;

/* The sum over columns, in four chains, in one order. */
static float dot(const float *a, const float *b, int64_t n) {
    vf sums[4] = {vf_set1(0), vf_set1(0), vf_set1(0), vf_set1(0)};
    int64_t i = 0;
    for (; i + 4 * VW <= n; i += 4 * VW)
        EACH for (int c = 0; c < 4; c++) sums[c] = vf_fma(vf_load(a + i + c * VW), vf_load(b + i + c * VW), sums[c]);
    float sum = vf_sum(vf_add(vf_add(sums[0], sums[1]), vf_add(sums[2], sums[3])));
    for (; i < n; i++) sum += a[i] * b[i];
    return sum;
}

static void score_experts(void *context, int64_t index) {
    const Routing *r = context;
    const int64_t num_experts = r->router->num_experts, width = r->router->width;
    const int64_t row = index / r->parts, part = index % r->parts;
    float x[width];
    read_normed(r->norm, r->x, r->dtype, row, width, x);
    for (int64_t e = num_experts * part / r->parts; e < num_experts * (part + 1) / r->parts; e++)
        r->logits[row * num_experts + e] = dot(x, r->router->weight + e * width, width);
}

static void choose_experts(void *context, int64_t row) {
    const Routing *r = context;
    const int64_t num_experts = r->router->num_experts, num_chosen = r->router->num_chosen;
    float *probabilities = r->logits + row * num_experts, scores[num_experts];
    float most = -INFINITY, sum = 0, chosen_sum = 0;
    for (int64_t e = 0; e < num_experts; e++) most = probabilities[e] > most ? probabilities[e] : most;
    for (int64_t e = 0; e < num_experts; e++) sum += probabilities[e] = expf(probabilities[e] - most);
    for (int64_t e = 0; e < num_experts; e++) {
        probabilities[e] /= sum;
        scores[e] = probabilities[e] + (r->router->correction ? r->router->correction[e] : 0);
    }
    int64_t *chosen = r->chosen + row * num_chosen;
    float *shares = r->shares + row * num_chosen;
    for (int64_t k = 0; k < num_chosen; k++) {
        int64_t best = -1;
        for (int64_t e = 0; e < num_experts; e++) {
            int64_t taken = 0;
            for (int64_t other = 0; other < k; other++) taken |= chosen[other] == e;
            if (!taken && (best < 0 || scores[e] > scores[best])) best = e;
        }
        chosen[k] = best;
        shares[k] = probabilities[best];
        chosen_sum += shares[k];
    }
    if (chosen_sum < r->router->norm_min) chosen_sum = r->router->norm_min;
    for (int64_t k = 0; k < num_chosen; k++) shares[k] /= chosen_sum;
}

static int route(const E45Norm *norm, const E45Router *router, const void *x, int64_t num_tokens, int64_t dtype,
                 int64_t *chosen, float *shares) {
    if (!num_tokens) return 0;
    float *logits = pool_workspace(num_tokens * router->num_experts * 4);
    if (!logits) return -1;
    /* Few rows are shared out by experts, too: a router's weights are read at the rate of one thread otherwise. */
    int64_t parts = num_tokens < TASKS_PER_THREAD ? pool_threads() : 1;
    Routing routing = {norm, router, x, dtype, parts, logits, chosen, shares};
    pool_run(score_experts, &routing, num_tokens * parts);
    pool_run(choose_experts, &routing, num_tokens);
    return 0;
}

static int layers(const E45Layer *list, const E45KV *kv, int64_t num_layers, const E45Batch *batch, void *x,
                  int64_t dtype) {
    const int64_t n = batch->num_tokens;
    int64_t most = 0;
    for (int64_t i = 0; i < num_layers; i++)
        if (list[i].router && list[i].router->num_chosen > most) most = list[i].router->num_chosen;
    int64_t *chosen = malloc((size_t)(n * most * 12 + 1));
    int failed = chosen ? 0 : -1;
    for (int64_t i = 0; i < num_layers && !failed; i++) {
        const E45Layer *layer = &list[i];
        const E45Router *router = layer->router;
        float *shares = (float *)(chosen + n * most);
        failed = attention(&layer->attention, batch, &kv[i], x, dtype);
        if (failed) break;
        if (router) {
            failed = route(&layer->norm, router, x, n, dtype, chosen, shares);
            const E45Part all = {.count = router->num_experts};
            if (!failed)
                failed = experts(&layer->norm, layer->experts, &all, layer->shared, chosen, shares, router->num_chosen,
                                 x, n, dtype);
        } else {
            failed = mlp(&layer->norm, layer->shared, x, n, dtype);
        }
    }
    free(chosen);
    return failed;
}

typedef struct {
    const E45Matrix *m;
    const int64_t *ids;
    void *y;
    int64_t dtype;
} Lookup;

static void look_up_row(void *context, int64_t index) {
    const Lookup *look = context;
    const E45Matrix *m = look->m;
    const int64_t id = look->ids[index], panel = id / E45_PANEL, lane = id % E45_PANEL;
    const int64_t num_dwords = m->in_features * CODES_BYTES(m->kind) / 4;
    const uint8_t *dwords = m->panels + panel * num_dwords * STEP_BYTES + lane * 4;
    float values[m->in_features];
    for (int64_t d = 0; d < num_dwords; d++) {
        const uint8_t *bytes = dwords + d * STEP_BYTES;
        if (m->kind == E45_DENSE) {
            uint16_t pair[2];
            memcpy(pair, bytes, 4);
            values[2 * d] = from_bf16(pair[0]), values[2 * d + 1] = from_bf16(pair[1]);
        } else {
            for (int i = 0; i < 4; i++) values[4 * d + i] = (float)(bytes[i] - 128) * m->row_scales[id];
        }
    }
    write_part(look->y, look->dtype, index * m->in_features, m->in_features, values, 0);
}

static int lookup(const E45Matrix *m, const int64_t *ids, int64_t num_tokens, void *y, int64_t dtype) {
    Lookup look = {m, ids, y, dtype};
    pool_run(look_up_row, &look, num_tokens);
    return 0;
}

#define JOIN2(a, b) a##b
#define JOIN(a, b) JOIN2(a, b)
#define TEXT2(a) #a
#define TEXT(a) TEXT2(a)

const Variant JOIN(variant_, E45_ISA) = {
    TEXT(E45_ISA), linear, lookup, attention, mlp, route, experts, add_outputs, layers, head,
};
