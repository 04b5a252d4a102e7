/* Dense MLPs and experts: a dense one is one that all tokens use, with a share of 1. */
#pragma once
#include "phases.h"

typedef struct {
    const E45Mlp *mlp;
    int64_t first, count; /* of the rows in the order of their MLPs */
    Inputs in, wide_in;   /* norm(x); silu(gate) · up of its rows, numbered from `first` on */
} Use;

typedef struct {
    int64_t num_uses, num_rows, num_tokens, width, dtype;
    Use *uses;
    int64_t *tokens; /* [rows]: which token a row is of */
    float *shares;   /* [rows] */
    float **wide;    /* [rows]: where silu(gate) · up of a row is */
    void *x;
    float *sums;         /* [tokens][width], of the experts in calls before, or NULL */
    int64_t begins, ends; /* whether nothing was summed before, and whether this is all */
    int64_t *starts; /* [uses + 1]: the first task of a use */
    int64_t gate_run, down_run, down_rows; /* panels of a task, and rows of one that adds up */
} Mlps;

static int64_t mlp_width(const E45Mlp *mlp) { return mlp->gate_up.out_features / 2; }

static void add_bias(const E45Matrix *m, int64_t panel, float *values) {
    if (!m->bias) return;
    int64_t first = panel * E45_PANEL;
    for (int64_t n = 0; n < smaller(m->out_features - first, E45_PANEL); n++) values[n] += m->bias[first + n];
}

/* Some panels of gate and then of up: to each its own stretch of memory. Until up is there gate lies in `wide`. */
static void gate_panels(void *context, int64_t index) {
    const Mlps *mlps = context;
    int64_t u = 0;
    while (index >= mlps->starts[u + 1]) u++;
    const Use *use = &mlps->uses[u];
    const E45Matrix *m = &use->mlp->gate_up;
    const int64_t blocks = (use->count + ROW_BLOCK - 1) / ROW_BLOCK, half = mlp_width(use->mlp) / E45_PANEL;
    const int64_t first = (index - mlps->starts[u]) / blocks * mlps->gate_run;
    const int64_t done = (index - mlps->starts[u]) % blocks * ROW_BLOCK, row = use->first + done;
    const int64_t count = smaller(use->count - done, ROW_BLOCK), end = smaller(first + mlps->gate_run, half);
    float out[ROW_BLOCK][E45_PANEL];
    for (int64_t panel = first; panel < end; panel++) {
        multiply(m, panel, &use->in, mlps->tokens, row, count, out);
        for (int64_t i = 0; i < count; i++) {
            add_bias(m, panel, out[i]);
            memcpy(mlps->wide[row + i] + panel * E45_PANEL, out[i], sizeof out[i]);
        }
    }
    for (int64_t panel = first; panel < end; panel++) {
        multiply(m, half + panel, &use->in, mlps->tokens, row, count, out);
        for (int64_t i = 0; i < count; i++) {
            float *wide = mlps->wide[row + i] + panel * E45_PANEL;
            add_bias(m, half + panel, out[i]);
            for (int n = 0; n < E45_PANEL; n += VW) {
                vf gate = vf_load(wide + n), one = vf_set1(1);
                vf silu = vf_div(gate, vf_add(one, vf_exp(vf_sub(vf_set1(0), gate))));
                vf_store(wide + n, vf_mul(silu, vf_load(out[i] + n)));
            }
        }
    }
}

static void prepare_wide(void *context, int64_t row) {
    const Mlps *mlps = context;
    int64_t u = 0;
    while (row >= mlps->uses[u].first + mlps->uses[u].count) u++;
    const Use *use = &mlps->uses[u];
    put_row(&use->wide_in, row - use->first, mlps->wide[row]);
}

static float *kept_sums(const Mlps *mlps, int64_t panel, int64_t token) {
    return mlps->sums + token * mlps->width + panel * E45_PANEL;
}

static size_t panel_bytes(const Mlps *mlps, int64_t panel) {
    return (size_t)smaller(mlps->width - panel * E45_PANEL, E45_PANEL) * sizeof(float);
}

/* Some panels of the outputs, summed over the MLPs in their order and added to x, or kept: each token's by one task. */
static void down_panels(void *context, int64_t index) {
    const Mlps *mlps = context;
    const int64_t rows = mlps->down_rows, blocks = (mlps->num_tokens + rows - 1) / rows;
    const int64_t first_panel = index / blocks * mlps->down_run, first = index % blocks * rows, end = first + rows;
    const int64_t num_panels = (mlps->width + E45_PANEL - 1) / E45_PANEL;
    const int64_t end_panel = smaller(first_panel + mlps->down_run, num_panels);
    float sums[ROW_BLOCK][E45_PANEL], out[ROW_BLOCK][E45_PANEL];
    memset(sums, 0, sizeof sums);
    for (int64_t panel = first_panel; panel < end_panel && !mlps->begins; panel++)
        for (int64_t token = first; token < smaller(end, mlps->num_tokens); token++)
            memcpy(sums[(panel - first_panel) * rows + token - first], kept_sums(mlps, panel, token),
                   panel_bytes(mlps, panel));
    for (int64_t u = 0; u < mlps->num_uses; u++) {
        const Use *use = &mlps->uses[u];
        const int64_t *tokens = mlps->tokens + use->first;
        int64_t from = 0, to; /* of the use's rows, whose tokens ascend, those of this block */
        while (from < use->count && tokens[from] < first) from++;
        for (to = from; to < use->count && tokens[to] < end;) to++;
        for (int64_t panel = first_panel; panel < end_panel; panel++) {
            multiply(&use->mlp->down, panel, &use->wide_in, NULL, from, to - from, out);
            for (int64_t i = from; i < to; i++) {
                add_bias(&use->mlp->down, panel, out[i - from]);
                const vf share = vf_set1(mlps->shares[use->first + i]);
                float *sum = sums[(panel - first_panel) * rows + tokens[i] - first];
                for (int n = 0; n < E45_PANEL; n += VW)
                    vf_store(sum + n, vf_fma(share, vf_load(out[i - from] + n), vf_load(sum + n)));
            }
        }
    }
    for (int64_t panel = first_panel; panel < end_panel; panel++) {
        const int64_t place = panel * E45_PANEL, width = smaller(mlps->width - place, E45_PANEL);
        for (int64_t token = first; token < smaller(end, mlps->num_tokens); token++) {
            const float *sum = sums[(panel - first_panel) * rows + token - first];
            if (mlps->ends) write_part(mlps->x, mlps->dtype, token * mlps->width + place, width, sum, 1);
            else memcpy(kept_sums(mlps, panel, token), sum, panel_bytes(mlps, panel));
        }
    }
}

/* The rows of each MLP, in the order of tokens; the shared one comes first. */
static void assign_rows(Mlps *mlps, const E45Mlp *const *experts, const E45Range *range, const E45Mlp *shared,
                        const int64_t *chosen, const float *shares, int64_t num_chosen) {
    int64_t row = 0;
    mlps->num_uses = 0;
    if (shared) {
        mlps->uses[mlps->num_uses++] = (Use){.mlp = shared, .first = row, .count = mlps->num_tokens};
        for (; row < mlps->num_tokens; row++) {
            mlps->tokens[row] = row;
            mlps->shares[row] = 1;
        }
    }
    for (int64_t expert = mlps->begins ? 0 : range->from; expert < range->to; expert++) {
        int64_t first = row;
        for (int64_t i = 0; i < mlps->num_tokens * num_chosen; i++) {
            if (chosen[i] != expert) continue;
            mlps->tokens[row] = i / num_chosen;
            mlps->shares[row++] = shares[i];
        }
        if (row > first) mlps->uses[mlps->num_uses++] = (Use){.mlp = experts[expert], .first = first, .count = row - first};
    }
    mlps->num_rows = row;
}

/* What the MLPs work on: norm(x) in each form that one takes, their wide rows, and the wide rows' forms. */
static void take_rows(Mlps *mlps, Room *room, Inputs forms[3]) {
    for (int kind = E45_DENSE; kind <= E45_INT4; kind++) {
        forms[kind] = (Inputs){.kind = -1};
        for (int64_t u = 0; u < mlps->num_uses && forms[kind].kind < 0; u++) {
            const E45Matrix *m = &mlps->uses[u].mlp->gate_up;
            if (m->kind == kind) forms[kind] = take_inputs(room, kind, m->in_features, mlps->num_tokens);
        }
    }
    for (int64_t u = 0; u < mlps->num_uses; u++) {
        Use *use = &mlps->uses[u];
        const int64_t width = mlp_width(use->mlp);
        float *wide = take(room, use->count * width * 4);
        for (int64_t i = 0; room->base && i < use->count; i++) mlps->wide[use->first + i] = wide + i * width;
        use->in = forms[use->mlp->gate_up.kind];
        use->wide_in = take_inputs(room, use->mlp->down.kind, use->mlp->down.in_features, use->count);
    }
}

static void run_mlps(const E45Norm *norm, Mlps *mlps, Inputs forms[3]) {
    Preparing preparing = {.norm = norm, .x = mlps->x, .dtype = mlps->dtype, .width = mlps->width};
    for (int kind = E45_DENSE, n = 0; kind <= E45_INT4; kind++)
        if (forms[kind].kind >= 0) preparing.in[n++] = &forms[kind];
    pool_run(prepare_row, &preparing, mlps->num_tokens);
    const int64_t num_panels = (mlps->width + E45_PANEL - 1) / E45_PANEL;
    int64_t num_pairs = 0;
    for (int64_t u = 0; u < mlps->num_uses; u++) num_pairs += mlp_width(mlps->uses[u].mlp) / E45_PANEL;
    mlps->gate_run = panels_per_task(&mlps->uses[0].mlp->gate_up, num_pairs);
    mlps->down_run = smaller(panels_per_task(&mlps->uses[0].mlp->down, num_panels), ROW_BLOCK / mlps->num_tokens);
    if (mlps->down_run < 1) mlps->down_run = 1;
    mlps->down_rows = ROW_BLOCK / mlps->down_run;
    mlps->starts[0] = 0;
    for (int64_t u = 0; u < mlps->num_uses; u++) {
        const Use *use = &mlps->uses[u];
        int64_t runs = (mlp_width(use->mlp) / E45_PANEL + mlps->gate_run - 1) / mlps->gate_run;
        mlps->starts[u + 1] = mlps->starts[u] + runs * ((use->count + ROW_BLOCK - 1) / ROW_BLOCK);
    }
    pool_run(gate_panels, mlps, mlps->starts[mlps->num_uses]);
    pool_run(prepare_wide, mlps, mlps->num_rows);
    int64_t blocks = (mlps->num_tokens + mlps->down_rows - 1) / mlps->down_rows;
    pool_run(down_panels, mlps, (num_panels + mlps->down_run - 1) / mlps->down_run * blocks);
}

static int experts(const E45Norm *norm, const E45Mlp *const *table, const E45Range *range, const E45Mlp *shared,
                   const int64_t *chosen, const float *shares, int64_t num_chosen, void *x, int64_t num_tokens,
                   int64_t dtype) {
    Mlps mlps = {.num_tokens = num_tokens, .x = x, .dtype = dtype, .sums = range->sums};
    Inputs forms[3];
    if (!num_tokens) return 0;
    mlps.begins = range->from < 0, mlps.ends = range->to == range->num_experts;
    if (!mlps.begins) shared = NULL;
    const int64_t most_rows = num_tokens * (num_chosen + (shared != NULL));
    const int64_t most_uses = smaller(range->to - range->from, num_tokens * num_chosen + 1);
    /* The lists lie on the heap: what the workspace needs is known once they are made. */
    char *lists = malloc((size_t)(most_uses * (int64_t)(sizeof(Use) + 8) + most_rows * 20 + 64));
    if (!lists) return -1;
    mlps.uses = (Use *)lists;
    mlps.starts = (int64_t *)(mlps.uses + most_uses);
    mlps.tokens = mlps.starts + most_uses + 1;
    mlps.wide = (float **)(mlps.tokens + most_rows);
    mlps.shares = (float *)(mlps.wide + most_rows);
    assign_rows(&mlps, table, range, shared, chosen, shares, num_chosen);
    mlps.width = mlps.uses[0].mlp->down.out_features;
    int failed = -1;
    Room room = {0};
    take_rows(&mlps, &room, forms);
    room = (Room){pool_workspace(room.used), 0};
    if (room.base) {
        take_rows(&mlps, &room, forms);
        run_mlps(norm, &mlps, forms);
        failed = 0;
    }
    free(lists);
    return failed;
}

static int mlp(const E45Norm *norm, const E45Mlp *only, void *x, int64_t num_tokens, int64_t dtype) {
    const E45Range all = {.from = -1};
    return experts(norm, NULL, &all, only, NULL, NULL, 0, x, num_tokens, dtype);
}
