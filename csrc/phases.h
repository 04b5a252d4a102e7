/* What layers are made of: rows put into the form of a matrix, and their product with it. Each phase runs its tasks on all
 * threads, and a task writes what no other does. */
#pragma once
#include "ernie45.h"
#include "matrix.h"
#include "pool.h"
#include "simd.h"

#define RUN_BYTES (192 << 10) /* of a matrix that a task reads one after the other, where there are enough tasks */
#define TASKS_PER_THREAD 8

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static int64_t num_panels(const E45Matrix *m) { return (m->out_features + E45_PANEL - 1) / E45_PANEL; }

/* Rows of x, [N, ·] of `dtype`. */

static void read_row(const void *x, int64_t dtype, int64_t row, int64_t n, float *out) {
    if (dtype == E45_F32) memcpy(out, (const float *)x + row * n, (size_t)n * 4);
    else
        for (int64_t i = 0; i < n; i += VW) vf_store(out + i, vf_load_bf16((const uint16_t *)x + row * n + i));
}

/* Some of a row's numbers; `adds` to what is there. */
static void write_part(void *x, int64_t dtype, int64_t place, int64_t n, const float *values, int64_t adds) {
    if (dtype == E45_F32) {
        for (int64_t i = 0; i < n; i++) ((float *)x)[place + i] = values[i] + (adds ? ((float *)x)[place + i] : 0);
        return;
    }
    uint16_t *to = (uint16_t *)x + place;
    int64_t i = 0;
    for (; i + VW <= n; i += VW) {
        vf value = vf_load(values + i);
        vf_write_bf16(to + i, adds ? vf_add(vf_load_bf16(to + i), value) : value);
    }
    for (; i < n; i++) to[i] = to_bf16(values[i] + (adds ? from_bf16(to[i]) : 0));
}

/* A row of norm(x), with the roundings of a model that computes in `dtype`; n is a multiple of 32. */
static void read_normed(const E45Norm *norm, const void *x, int64_t dtype, int64_t row, int64_t n, float *out) {
    read_row(x, dtype, row, n, out);
    vf squares = vf_set1(0);
    for (int64_t i = 0; i < n; i += VW) squares = vf_fma(vf_load(out + i), vf_load(out + i), squares);
    vf inverse = vf_set1(1 / sqrtf(vf_sum(squares) / (float)n + norm->eps));
    for (int64_t i = 0; i < n; i += VW) {
        uint16_t rounded[VW];
        vf value = vf_mul(vf_load(out + i), inverse);
        if (dtype == E45_BF16) vf_write_bf16(rounded, value), value = vf_load_bf16(rounded);
        value = vf_mul(value, vf_load(norm->weight + i));
        if (dtype == E45_BF16) vf_write_bf16(rounded, value), value = vf_load_bf16(rounded);
        vf_store(out + i, value);
    }
}

/* Phase: rows into the form that a matrix takes. */

typedef struct {
    const E45Norm *norm; /* or NULL: x as it is */
    const void *x;
    int64_t dtype, width;
    const Inputs *in[3]; /* forms wanted, NULL for fewer */
} Preparing;

static void prepare_row(void *context, int64_t row) {
    const Preparing *p = context;
    float values[p->width];
    if (p->norm) read_normed(p->norm, p->x, p->dtype, row, p->width, values);
    else read_row(p->x, p->dtype, row, p->width, values);
    for (int i = 0; i < 3 && p->in[i]; i++) put_row(p->in[i], row, values);
}

/* Phase: y = x · Wᵀ + b, stored or added. */

typedef struct {
    const E45Matrix *m;
    Inputs in;
    int64_t num_rows, panels_per_task, num_row_blocks;
    void *y;
    int64_t dtype, adds;
} Product;

static void multiply_panels(void *context, int64_t index) {
    const Product *p = context;
    const int64_t outputs = p->m->out_features;
    const int64_t first = index / p->num_row_blocks * p->panels_per_task;
    const int64_t row = index % p->num_row_blocks * ROW_BLOCK, count = smaller(p->num_rows - row, ROW_BLOCK);
    float out[ROW_BLOCK][E45_PANEL];
    for (int64_t panel = first; panel < smaller(first + p->panels_per_task, num_panels(p->m)); panel++) {
        const int64_t place = panel * E45_PANEL, width = smaller(outputs - place, E45_PANEL);
        multiply(p->m, panel, &p->in, NULL, row, count, out);
        for (int64_t i = 0; i < count; i++) {
            if (p->m->bias)
                for (int64_t n = 0; n < width; n++) out[i][n] += p->m->bias[place + n];
            int64_t to = (row + i) * outputs + place;
            write_part(p->y, p->dtype, to, width, out[i], p->adds);
        }
    }
}

/* Of m, in one of `num_tasks` tasks of a panel each that a phase would have. */
static int64_t panels_per_task(const E45Matrix *m, int64_t num_tasks) {
    int64_t dwords = m->in_features * CODES_BYTES(m->kind) / 4;
    if (m->kind == E45_INT4) dwords = e45_int4_dwords(m->in_features);
    int64_t wanted = (RUN_BYTES - 1) / (dwords * STEP_BYTES) + 1, most = num_tasks / (TASKS_PER_THREAD * pool_threads());
    return wanted < most ? wanted : most > 1 ? most : 1;
}

static void run_product(Product *p) {
    p->num_row_blocks = (p->num_rows + ROW_BLOCK - 1) / ROW_BLOCK;
    p->panels_per_task = panels_per_task(p->m, num_panels(p->m));
    int64_t chunks = (num_panels(p->m) + p->panels_per_task - 1) / p->panels_per_task;
    pool_run(multiply_panels, p, chunks * p->num_row_blocks);
}

/* y = norm(x) · Wᵀ + b; without a norm, of x itself */
static int product_of(const E45Norm *norm, const E45Matrix *m, const void *x, int64_t num_tokens, int64_t dtype, void *y,
                      int64_t y_dtype) {
    Product product = {.m = m, .num_rows = num_tokens, .y = y, .dtype = y_dtype};
    if (!num_tokens) return 0;
    for (Room room = {0};; room = (Room){pool_workspace(room.used), 0}) {
        product.in = take_inputs(&room, m->kind, m->in_features, num_tokens);
        if (room.base) break;
        if (!pool_workspace(room.used)) return -1;
    }
    Preparing preparing = {.norm = norm, .x = x, .dtype = dtype, .width = m->in_features, .in = {&product.in}};
    pool_run(prepare_row, &preparing, num_tokens);
    run_product(&product);
    return 0;
}

static int linear(const E45Matrix *m, const void *x, int64_t num_tokens, void *y, int64_t dtype) {
    return product_of(NULL, m, x, num_tokens, dtype, y, dtype);
}

static int head(const E45Norm *norm, const E45Matrix *m, const void *x, int64_t num_tokens, int64_t dtype,
                float *logits) {
    return product_of(norm, m, x, num_tokens, dtype, logits, E45_F32);
}
