/* Causal attention over a KV cache.
 *
 * The keys of a sequence are worked on in blocks and spans that begin at fixed positions, and a token's query heads
 * see just the keys up to its own position, always by the same operations: how tokens are grouped in calls, and which
 * thread takes which span, does not show in the bits. The cache (E45KV) has dwords of 32 keys side by side, and of
 * values those of all columns, so that both products are one: rows of dwords times a panel as it lies there. A dword
 * is a float where the cache is F32, else 2 bfloat16: neighbours of a key, or a column's values of two tokens. In I8
 * it is a word, of which dwords are made block by block.
 *
 * Softmax is in powers of two, o and l being sums over keys of 2^(x - m) · value and of 2^(x - m), where m is the
 * highest x so far. D is a multiple of 32, G = H / Hkv. */
#pragma once
#include "attention_block.h"
#include "pool.h"

#include <stdatomic.h>

#define KEY_SPAN 1024 /* keys that one thread takes where tokens are few */

typedef struct {
    const E45Attention *attention;
    const E45Batch *batch;
    const E45KV *kv;
    float *qkv, *out;
    float *partials; /* of runs of up to QUERY_TILE tokens: m, l, o[D] of each token, query head and span */
    uint8_t *scratch;
    int64_t scratch_bytes, num_items;
    _Atomic int64_t next_item;
} Attend;

/* What a thread works on: some tokens of one run, one key/value head, and the keys of all spans or of one. */
typedef struct {
    int64_t run, kv_head, first_row, first_position, num_tokens, first_span, end_span;
    float *partials; /* where the spans' results go; NULL if they are added up at once */
} Item;

/* ---- the cache ---- */

/* The first key's place in a slot, in tokens. */
static int64_t cache_row(const Attend *a, int64_t slot, int64_t kv_head) {
    return (slot * a->attention->num_kv_heads + kv_head) * a->kv->context_tokens;
}

/* Numbers of a key, or tokens of a column of values, in a dword or word. */
static int64_t num_paired(int64_t kind) { return kind == E45_F32 ? 1 : 2; }

static void rotate(float *restrict x, const float *restrict cos, const float *restrict sin, int64_t head_dim) {
    for (int64_t i = 0; i < head_dim / 2; i++) {
        float even = x[2 * i], odd = x[2 * i + 1];
        x[2 * i] = even * cos[i] - odd * sin[i];
        x[2 * i + 1] = odd * cos[i] + even * sin[i];
    }
}

static void narrow(float *x, int64_t count) { /* to bfloat16, in place */
    for (int64_t i = 0; i < count; i += VW) vf_write_bf16((uint16_t *)x + i, vf_load(x + i));
}

/* x becomes codes of x over its highest / 127, that being rounded to bfloat16 first, in place. */
static void round_int8(float *x, uint16_t *scale, int64_t count) {
    uint32_t most = 0; /* as bits, of which those of NaN are highest */
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, 4);
        bits &= 0x7fffffff;
        most = bits > most ? bits : most;
    }
    float highest;
    memcpy(&highest, &most, 4);
    highest /= 127.0f;
    *scale = to_bf16(highest < 0x1p-126f ? 0x1p-126f : highest);
    vf divisor = vf_set1(from_bf16(*scale));
    for (int64_t i = 0; i < count; i += VW) vi_write_i8((int8_t *)x + i, vi_of_float(vf_div(vf_load(x + i), divisor)));
}

/* Pieces of x, `stride` bytes apart at `to`. */
static void scatter(uint8_t *to, int64_t stride, const void *x, int64_t piece_bytes, int64_t count) {
    const uint8_t *from = x;
    if (piece_bytes == 4)
        for (int64_t i = 0; i < count; i++) memcpy(to + i * stride, from + i * 4, 4);
    else if (piece_bytes == 2)
        for (int64_t i = 0; i < count; i++) memcpy(to + i * stride, from + i * 2, 2);
    else
        for (int64_t i = 0; i < count; i++) to[i * stride] = from[i];
}

/* Put a token's key and value into the cache; both are lost. */
static void write_row(const E45KV *kv, int64_t row, float *key, float *value, int64_t head_dim) {
    const int64_t bytes = element_bytes(kv->kind), paired = num_paired(kv->kind);
    const int64_t key_place = row / E45_KV_BLOCK * E45_KV_BLOCK * head_dim + row % E45_KV_BLOCK * paired;
    const int64_t value_place = row / paired * paired * head_dim + row % paired;
    if (kv->kind == E45_BF16) narrow(key, head_dim), narrow(value, head_dim);
    if (kv->kind == E45_I8) {
        round_int8(key, kv->key_scales + row, head_dim);
        round_int8(value, kv->value_scales + row, head_dim);
    }
    scatter((uint8_t *)kv->keys + key_place * bytes, E45_KV_BLOCK * paired * bytes, key, paired * bytes,
            head_dim / paired);
    scatter((uint8_t *)kv->values + value_place * bytes, paired * bytes, value, bytes, head_dim);
}

/* Rotate a token's key and the queries that see it, and put its key and value into the cache. Queries stay where they
 * are, as bfloat16 unless the cache is F32. */
static void write_token(const Attend *a, int64_t kv_head, int64_t token, int64_t slot, int64_t position) {
    const int64_t num_heads = a->attention->num_heads, num_kv_heads = a->attention->num_kv_heads;
    const int64_t head_dim = a->attention->head_dim, group = num_heads / num_kv_heads;
    const float *cos = a->batch->cos + token * head_dim / 2, *sin = a->batch->sin + token * head_dim / 2;
    float *queries = a->qkv + token * (num_heads + 2 * num_kv_heads) * head_dim;
    float *key = queries + (num_heads + kv_head) * head_dim;
    rotate(key, cos, sin, head_dim);
    write_row(a->kv, cache_row(a, slot, kv_head) + position, key, key + num_kv_heads * head_dim, head_dim);
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++) {
        rotate(queries + head * head_dim, cos, sin, head_dim);
        if (a->kv->kind != E45_F32) narrow(queries + head * head_dim, head_dim);
    }
}

/* Of QUERY_TILE tokens, for one key/value head. */
static void write_tokens(void *context, int64_t index) {
    const Attend *a = context;
    const E45Batch *batch = a->batch;
    const int64_t num_kv_heads = a->attention->num_kv_heads;
    int64_t first = index / num_kv_heads * QUERY_TILE, end = first + QUERY_TILE, token = 0;
    for (int64_t run = 0; run < batch->num_rows; run++)
        for (int64_t i = 0; i < batch->counts[run]; i++, token++)
            if (token >= first && token < end)
                write_token(a, index % num_kv_heads, token, batch->slots[run], batch->starts[run] + i);
}

/* ---- blocks and spans ---- */

static void load_scales(const Attend *a, int64_t row, int64_t num_keys, const Scratch *s) {
    float unit = 1.44269504f / sqrtf((float)a->attention->head_dim);
    for (int64_t i = 0; i < KEY_BLOCK; i++) {
        int is_int8 = a->kv->kind == E45_I8 && i < num_keys;
        s->key_scales[i] = is_int8 ? unit * from_bf16(a->kv->key_scales[row + i]) : unit;
        s->value_scales[i] = is_int8 ? from_bf16(a->kv->value_scales[row + i]) : 1.0f;
    }
}

/* Keys of a block, from `first` on, that a token at `position` sees. */
static int64_t seen_keys(int64_t position, int64_t first) {
    int64_t seen = position + 1 - first;
    return seen < 0 ? 0 : seen < KEY_BLOCK ? seen : KEY_BLOCK;
}

/* What a product of `num_steps` is to bring nearer at `offset` of the bytes worked on next: each part of them once. */
static const uint8_t *part_ahead(const uint8_t *next, int64_t offset, int64_t num_steps) {
    return next && offset % (num_steps * 128) == 0 ? next + offset : NULL;
}

/* Scores of a block's keys; the softmax so far. */
static void score_block(const Attend *a, const Item *item, int64_t first, int64_t num_keys, const uint8_t *keys,
                        const uint8_t *next, const Scratch *s) {
    const E45Attention *attention = a->attention;
    const int64_t head_dim = attention->head_dim, group = attention->num_heads / attention->num_kv_heads;
    const int64_t qkv_bytes = (attention->num_heads + 2 * attention->num_kv_heads) * head_dim * 4;
    const int wide = a->kv->kind == E45_F32;
    const int64_t num_dwords = head_dim / num_paired(a->kv->kind), key_bytes = head_dim * element_bytes(a->kv->kind);
    const uint8_t *queries = (const uint8_t *)a->qkv + item->first_row * qkv_bytes;
    queries += item->kv_head * group * head_dim * 4;
    for (int64_t key = 0; key < num_keys; key += PRODUCT_WIDTH) {
        const uint8_t *panel = keys + (key / E45_KV_BLOCK * E45_KV_BLOCK * num_dwords + key % E45_KV_BLOCK) * 4;
        for (int64_t t = 0; t < item->num_tokens; t++)
            if (seen_keys(item->first_position + t, first) > key)
                product_rows(group, wide, panel, E45_KV_BLOCK * 4, num_dwords, 0, queries + t * qkv_bytes, head_dim * 4,
                             s->scores + t * group * KEY_BLOCK + key, KEY_BLOCK, NULL,
                             t ? NULL : part_ahead(next, key * key_bytes, num_dwords));
    }
    for (int64_t t = 0; t < item->num_tokens; t++) {
        int64_t seen = seen_keys(item->first_position + t, first);
        for (int64_t r = t * group; seen && r < (t + 1) * group; r++)
            soften_row(a->kv->kind, s->scores + r * KEY_BLOCK, seen, s, r);
    }
}

/* Sums of a block's values by these scores. */
static void weigh_block(const Attend *a, const Item *item, int64_t first, const uint8_t *values, const uint8_t *next,
                        const Scratch *s) {
    const int64_t head_dim = a->attention->head_dim, group = a->attention->num_heads / a->attention->num_kv_heads;
    const int wide = a->kv->kind == E45_F32;
    const int64_t paired = num_paired(a->kv->kind), bytes = element_bytes(a->kv->kind);
    for (int64_t i = 0; i < head_dim; i += PRODUCT_WIDTH)
        for (int64_t t = 0; t < item->num_tokens; t++) {
            int64_t seen = seen_keys(item->first_position + t, first), row = t * group;
            const uint8_t *p = (const uint8_t *)(s->scores + row * KEY_BLOCK);
            const uint8_t *ahead = t ? NULL : part_ahead(next, i * KEY_BLOCK * bytes, KEY_BLOCK / paired);
            if (seen)
                product_rows(group, wide, values + i * 4, head_dim * 4, seen / paired, seen % paired, p, KEY_BLOCK * 4,
                             s->o + row * head_dim + i, head_dim, s->factors + row, ahead);
        }
}

/* A block's keys or values as the products take them. */
static const uint8_t *panels_of(const Attend *a, const uint8_t *stored, int64_t num_keys, const Scratch *s) {
    if (a->kv->kind != E45_I8) return stored;
    int64_t num_laid = (num_keys + E45_KV_BLOCK - 1) / E45_KV_BLOCK * E45_KV_BLOCK;
    widen((const int8_t *)stored, num_laid * a->attention->head_dim, s->widened);
    return (const uint8_t *)s->widened;
}

/* A block's values are brought nearer while its keys are worked on, and the keys of the next with its values. */
static void attend_block(const Attend *a, const Item *item, int64_t first, const Scratch *s) {
    const int64_t head_dim = a->attention->head_dim, row_bytes = head_dim * element_bytes(a->kv->kind);
    const int64_t row = cache_row(a, a->batch->slots[item->run], item->kv_head) + first;
    const int64_t last = item->first_position + item->num_tokens - 1, num_keys = seen_keys(last, first);
    const uint8_t *keys = (const uint8_t *)a->kv->keys + row * row_bytes;
    const uint8_t *values = (const uint8_t *)a->kv->values + row * row_bytes;
    const int64_t next = first + KEY_BLOCK;
    const int goes_on = next <= last && next < item->end_span * KEY_SPAN;

    load_scales(a, row, num_keys, s);
    score_block(a, item, first, num_keys, panels_of(a, keys, num_keys, s), values, s);
    weigh_block(a, item, first, panels_of(a, values, num_keys, s), goes_on ? keys + KEY_BLOCK * row_bytes : NULL, s);
}

static void attend_span(const Attend *a, const Item *item, int64_t span, const Scratch *s) {
    const int64_t head_dim = a->attention->head_dim, group = a->attention->num_heads / a->attention->num_kv_heads;
    const int64_t num_rows = item->num_tokens * group, last = item->first_position + item->num_tokens - 1;
    memset(s->o, 0, (size_t)(num_rows * head_dim) * 4);
    memset(s->l, 0, (size_t)(num_rows * VW) * 4);
    for (int64_t r = 0; r < num_rows; r++) s->m[r] = -INFINITY;
    for (int64_t first = span * KEY_SPAN; first < (span + 1) * KEY_SPAN && first <= last; first += KEY_BLOCK)
        attend_block(a, item, first, s);
}

static int64_t count_spans(const E45Batch *batch, int64_t run) {
    return (batch->starts[run] + batch->counts[run] - 1) / KEY_SPAN + 1;
}

/* A span's result goes to the partials, or into `out` and the totals. */
static void keep_span(const Attend *a, const Item *item, int64_t span, const Scratch *s) {
    const int64_t head_dim = a->attention->head_dim, num_heads = a->attention->num_heads;
    const int64_t group = num_heads / a->attention->num_kv_heads;
    const int64_t num_spans = count_spans(a->batch, item->run);
    for (int64_t t = 0; t < item->num_tokens; t++) {
        if (item->first_position + t < span * KEY_SPAN) continue;
        for (int64_t g = 0; g < group; g++) {
            int64_t row = t * group + g, head = item->kv_head * group + g;
            float l = vf_sum(vf_load(s->l + row * VW));
            if (item->partials) {
                float *partial = item->partials + ((t * num_heads + head) * num_spans + span) * (head_dim + 2);
                partial[0] = s->m[row], partial[1] = l;
                memcpy(partial + 2, s->o + row * head_dim, (size_t)head_dim * 4);
            } else {
                float *out = a->out + ((item->first_row + t) * num_heads + head) * head_dim;
                if (!span) memset(out, 0, (size_t)head_dim * 4), s->total_m[row] = -INFINITY, s->total_l[row] = 0.0f;
                add_span(s->total_m + row, s->total_l + row, out, s->m[row], l, s->o + row * head_dim, head_dim);
            }
        }
    }
}

/* ---- items ---- */

/* Each span is an item of its own where a run's tokens make one tile, else each tile. */
static int64_t count_items(const E45Attention *attention, const E45Batch *batch, int64_t run) {
    int64_t count = batch->counts[run];
    if (count < 1) return 0;
    return attention->num_kv_heads * (count <= QUERY_TILE ? count_spans(batch, run) : (count - 1) / QUERY_TILE + 1);
}

static int64_t count_partials(const E45Attention *attention, const E45Batch *batch, int64_t run) { /* in floats */
    int64_t count = batch->counts[run];
    if (count < 1 || count > QUERY_TILE) return 0;
    return count * attention->num_heads * count_spans(batch, run) * (attention->head_dim + 2);
}

static Item find_item(const Attend *a, int64_t index) {
    Item item = {.partials = a->partials};
    int64_t num_items;
    while (index >= (num_items = count_items(a->attention, a->batch, item.run))) {
        index -= num_items;
        item.partials += count_partials(a->attention, a->batch, item.run);
        item.first_row += a->batch->counts[item.run++];
    }
    const int64_t count = a->batch->counts[item.run], num_parts = num_items / a->attention->num_kv_heads;
    int64_t part = num_parts - 1 - index / a->attention->num_kv_heads; /* the longest first */
    item.kv_head = index % a->attention->num_kv_heads;
    item.first_position = a->batch->starts[item.run];
    if (count <= QUERY_TILE) {
        item.num_tokens = count, item.first_span = part, item.end_span = part + 1;
        return item;
    }
    item.partials = NULL;
    item.first_row += part * QUERY_TILE, item.first_position += part * QUERY_TILE;
    item.num_tokens = count - part * QUERY_TILE < QUERY_TILE ? count - part * QUERY_TILE : QUERY_TILE;
    item.end_span = (item.first_position + item.num_tokens - 1) / KEY_SPAN + 1;
    return item;
}

/* A thread's part of the workspace, or how many bytes that is where there is none yet. */
static int64_t lay_scratch(const E45Attention *attention, const E45KV *kv, uint8_t *at, Scratch *s) {
    const int64_t rows = QUERY_TILE * attention->num_heads / attention->num_kv_heads, head_dim = attention->head_dim;
    const int64_t sizes[] = {kv->kind == E45_I8 ? KEY_BLOCK * head_dim * 2 : 0,
                             KEY_BLOCK * 4,
                             KEY_BLOCK * 4,
                             rows * KEY_BLOCK * 4,
                             rows * head_dim * 4,
                             rows * VW * 4,
                             rows * 4,
                             rows * 4,
                             rows * 4,
                             rows * 4};
    uint8_t *places[sizeof sizes / sizeof *sizes];
    uint8_t *first = at;
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) places[i] = at, at += (sizes[i] + 63) / 64 * 64;
    *s = (Scratch){(uint16_t *)places[0], (float *)places[1], (float *)places[2], (float *)places[3],
                   (float *)places[4],    (float *)places[5], (float *)places[6], (float *)places[7],
                   (float *)places[8],    (float *)places[9]};
    return at - first;
}

static void take_items(void *context, int64_t worker) {
    Attend *a = context;
    const int64_t num_heads = a->attention->num_heads, head_dim = a->attention->head_dim;
    const int64_t group = num_heads / a->attention->num_kv_heads;
    Scratch s;
    lay_scratch(a->attention, a->kv, a->scratch + worker * a->scratch_bytes, &s);
    for (int64_t index; (index = atomic_fetch_add(&a->next_item, 1)) < a->num_items;) {
        Item item = find_item(a, index);
        for (int64_t span = item.first_span; span < item.end_span; span++) {
            attend_span(a, &item, span, &s);
            keep_span(a, &item, span, &s);
        }
        if (item.partials) continue;
        for (int64_t row = 0; row < item.num_tokens * group; row++) {
            int64_t head = item.kv_head * group + row % group;
            divide(a->out + ((item.first_row + row / group) * num_heads + head) * head_dim, s.total_l[row], head_dim);
        }
    }
}

/* The outputs of a run's tokens of which spans were items. */
static void add_partials(void *context, int64_t run) {
    const Attend *a = context;
    const int64_t num_heads = a->attention->num_heads, head_dim = a->attention->head_dim;
    if (!count_partials(a->attention, a->batch, run)) return;
    const float *partial = a->partials;
    float *out = a->out;
    for (int64_t i = 0; i < run; i++) {
        partial += count_partials(a->attention, a->batch, i);
        out += a->batch->counts[i] * num_heads * head_dim;
    }
    const int64_t num_spans = count_spans(a->batch, run);
    for (int64_t i = 0; i < a->batch->counts[run] * num_heads; i++, out += head_dim) {
        float m = -INFINITY, l = 0.0f;
        memset(out, 0, (size_t)head_dim * 4);
        for (int64_t span = 0; span < num_spans; span++, partial += head_dim + 2)
            if (a->batch->starts[run] + i / num_heads >= span * KEY_SPAN)
                add_span(&m, &l, out, partial[0], partial[1], partial + 2, head_dim);
        divide(out, l, head_dim);
    }
}

static void plan_attend(Attend *a, int64_t *num_workers, int64_t *partial_bytes) {
    Scratch s;
    int64_t num_partials = 0;
    for (int64_t run = 0; run < a->batch->num_rows; run++) {
        a->num_items += count_items(a->attention, a->batch, run);
        num_partials += count_partials(a->attention, a->batch, run);
    }
    *num_workers = a->num_items < pool_threads() ? a->num_items : pool_threads();
    *partial_bytes = (num_partials * 4 + 63) / 64 * 64;
    a->scratch_bytes = lay_scratch(a->attention, a->kv, NULL, &s);
}

/* Of the workspace that `attend` needs, aligned to 64 bytes. */
static int64_t attend_bytes(const E45Attention *attention, const E45Batch *batch, const E45KV *kv) {
    Attend a = {.attention = attention, .batch = batch, .kv = kv};
    int64_t num_workers, partial_bytes;
    plan_attend(&a, &num_workers, &partial_bytes);
    return partial_bytes + num_workers * a.scratch_bytes;
}

/* out [N][H · D] of qkv [N][(H + 2 · Hkv) · D], not yet rotated, which is lost; new keys and values go to the cache. */
static void attend(const E45Attention *attention, const E45Batch *batch, const E45KV *kv, float *qkv, float *out,
                   void *workspace) {
    Attend a = {.attention = attention, .batch = batch, .kv = kv, .qkv = qkv, .out = out, .partials = workspace};
    int64_t num_workers, partial_bytes;
    plan_attend(&a, &num_workers, &partial_bytes);
    a.scratch = (uint8_t *)workspace + partial_bytes;
    pool_run(write_tokens, &a, (batch->num_tokens + QUERY_TILE - 1) / QUERY_TILE * attention->num_kv_heads);
    pool_run(take_items, &a, num_workers);
    pool_run(add_partials, &a, batch->num_rows);
}
