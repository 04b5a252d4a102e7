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
    int64_t *places; /* [rows]: of its output */
    float *shares;   /* [rows] */
    float **wide;    /* [rows]: where silu(gate) · up of a row is */
    void *x;
    float *outputs; /* [places][width], or NULL: they are added to x */
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

static void add_share(float share, const float *out, int64_t width, float *sum) {
    const vf factor = vf_set1(share);
    for (int64_t n = 0; n < width; n += VW) vf_store(sum + n, vf_fma(factor, vf_load(out + n), vf_load(sum + n)));
}

/* Some panels of the outputs, kept, or summed over the MLPs in their order and added to x: each token's by one task. */
static void down_panels(void *context, int64_t index) {
    const Mlps *mlps = context;
    const int64_t rows = mlps->down_rows, blocks = (mlps->num_tokens + rows - 1) / rows;
    const int64_t first_panel = index / blocks * mlps->down_run, first = index % blocks * rows, end = first + rows;
    const int64_t num_panels = (mlps->width + E45_PANEL - 1) / E45_PANEL;
    const int64_t end_panel = smaller(first_panel + mlps->down_run, num_panels);
    float sums[ROW_BLOCK][E45_PANEL], out[ROW_BLOCK][E45_PANEL];
    memset(sums, 0, sizeof sums);
    for (int64_t u = 0; u < mlps->num_uses; u++) {
        const Use *use = &mlps->uses[u];
        const int64_t *tokens = mlps->tokens + use->first;
        int64_t from = 0, to; /* of the use's rows, whose tokens ascend, those of this block */
        while (from < use->count && tokens[from] < first) from++;
        for (to = from; to < use->count && tokens[to] < end;) to++;
        for (int64_t panel = first_panel; panel < end_panel; panel++) {
            const int64_t place = panel * E45_PANEL, width = smaller(mlps->width - place, E45_PANEL);
            multiply(&use->mlp->down, panel, &use->wide_in, NULL, from, to - from, out);
            for (int64_t i = from; i < to; i++) {
                const int64_t row = use->first + i;
                add_bias(&use->mlp->down, panel, out[i - from]);
                if (mlps->outputs)
                    memcpy(mlps->outputs + mlps->places[row] * mlps->width + place, out[i - from], (size_t)width * 4);
                else
                    add_share(mlps->shares[row], out[i - from], E45_PANEL,
                              sums[(panel - first_panel) * rows + tokens[i] - first]);
            }
        }
    }
    for (int64_t panel = first_panel; panel < end_panel && !mlps->outputs; panel++) {
        const int64_t place = panel * E45_PANEL, width = smaller(mlps->width - place, E45_PANEL);
        for (int64_t token = first; token < smaller(end, mlps->num_tokens); token++)
            write_part(mlps->x, mlps->dtype, token * mlps->width + place, width,
                       sums[(panel - first_panel) * rows + token - first], 1);
    }
}

/* The rows of each MLP, in the order of tokens; the shared one comes first. */
static void assign_rows(Mlps *mlps, const E45Mlp *const *experts, const E45Part *part, const E45Mlp *shared,
                        const int64_t *chosen, const float *shares, int64_t num_chosen) {
    int64_t row = 0;
    mlps->num_uses = 0;
    if (shared) {
        mlps->uses[mlps->num_uses++] = (Use){.mlp = shared, .first = row, .count = mlps->num_tokens};
        for (; row < mlps->num_tokens; row++) {
            mlps->tokens[row] = row;
            mlps->places[row] = mlps->num_tokens * num_chosen + row;
            mlps->shares[row] = 1;
        }
    }
    for (int64_t n = 0; n < part->count; n++) {
        const int64_t expert = part->numbers ? part->numbers[n] : n, first = row;
        for (int64_t i = 0; i < mlps->num_tokens * num_chosen; i++) {
            if (chosen[i] != expert) continue;
            mlps->tokens[row] = i / num_chosen;
            mlps->places[row] = i;
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

static int experts(const E45Norm *norm, const E45Mlp *const *table, const E45Part *part, const E45Mlp *shared,
                   const int64_t *chosen, const float *shares, int64_t num_chosen, void *x, int64_t num_tokens,
                   int64_t dtype) {
    Mlps mlps = {.num_tokens = num_tokens, .x = x, .dtype = dtype, .outputs = part->outputs};
    Inputs forms[3];
    if (!num_tokens) return 0;
    const int64_t most_rows = num_tokens * (num_chosen + (shared != NULL));
    const int64_t most_uses = smaller(part->count, num_tokens * num_chosen) + 1;
    /* The lists lie on the heap: what the workspace needs is known once they are made. */
    char *lists = malloc((size_t)(most_uses * (int64_t)(sizeof(Use) + 8) + most_rows * 28 + 64));
    if (!lists) return -1;
    mlps.uses = (Use *)lists;
    mlps.starts = (int64_t *)(mlps.uses + most_uses);
    mlps.tokens = mlps.starts + most_uses + 1;
    mlps.places = mlps.tokens + most_rows;
    mlps.wide = (float **)(mlps.places + most_rows);
    mlps.shares = (float *)(mlps.wide + most_rows);
    assign_rows(&mlps, table, part, shared, chosen, shares, num_chosen);
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
    const E45Part none = {0};
    return experts(norm, NULL, &none, only, NULL, NULL, 0, x, num_tokens, dtype);
}

typedef struct {
    const float *outputs, *shares;
    const int64_t *chosen;
    int64_t has_shared, num_chosen, num_tokens, width, dtype;
    void *x;
} Adding;

/* What was kept of a token, in the order of `down_panels`. */
static void add_row(void *context, int64_t token) {
    const Adding *a = context;
    const int64_t *chosen = a->chosen + token * a->num_chosen;
    float sum[a->width];
    memset(sum, 0, sizeof sum);
    if (a->has_shared)
        add_share(1, a->outputs + (a->num_tokens * a->num_chosen + token) * a->width, a->width, sum);
    for (int64_t last = -1, next = -1, n = 0; n < a->num_chosen; n++, last = chosen[next], next = -1) {
        for (int64_t k = 0; k < a->num_chosen; k++)
            if (chosen[k] > last && (next < 0 || chosen[k] < chosen[next])) next = k;
        const int64_t place = token * a->num_chosen + next;
        add_share(a->shares[place], a->outputs + place * a->width, a->width, sum);
    }
    write_part(a->x, a->dtype, token * a->width, a->width, sum, 1);
}

static int add_outputs(const float *outputs, int64_t has_shared, const int64_t *chosen, const float *shares,
                       int64_t num_chosen, void *x, int64_t num_tokens, int64_t width, int64_t dtype) {
    Adding adding = {outputs, shares, chosen, has_shared, num_chosen, num_tokens, width, dtype, x};
    pool_run(add_row, &adding, num_tokens);
    return 0;
}
