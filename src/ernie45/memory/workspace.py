"""What running and loading need beside the weights and the KV cache: arithmetic on a model's shape.

What was measured, and what the constants are made of: docs/decisions/0016-memory-plan.md. Shape letters: n tokens of a
step, S of the longest sequence, h hidden size, H and Hkv heads, D head width, I MLP width, K experts of a token,
V vocabulary, b bytes of a number.
"""

from __future__ import annotations

import math

from ernie45.memory.media import encoding_bytes
from ernie45.presets import INT4_GROUP, Part, QuantPreset
from ernie45.spec import DtypeName, ModelSpec

PREFILL_CHUNK_TOKENS = 512
"""Most prompt tokens in a step. Prompts are run in chunks whose edges are multiples of this, whatever else is running,
so that a prompt's numbers depend on the prompt alone."""

SCORED_ROWS = 8
"""Most tokens of a prompt whose logits are in memory at a time, however many of them are wanted."""

MAX_STEP_GUESSES = 16
"""Most guessed tokens that a step checks beside the one of each running row, over all rows."""

NUM_EXPERT_READERS = 2
"""Threads that read experts from disk; each has a buffer of its own."""

RUNTIME_BYTES = 30 * 2**20
"""What the first load and step bring in beyond the state after imports: libraries' code, the tokenizer, heaps."""

_TORCH_BYTES = 14 * 2**20  # more of the same where torch's products serve
_HEAP_SHARE = 1.5  # memory that the heap takes for what is in use at a time: freed pieces of other sizes lie between
_SCALED_VALUES = 2**19  # results that a quantised product scales at a time
_COMPILED_BYTES = 100 * 2**10  # oneDNN's code for a product of one shape, kept
_COMPILED_ROWS = 4  # products of fewer rows are padded to these; their code is in _TORCH_BYTES
_LAYER_BYTES = 600 * 2**10  # heap that a first step leaves taken for each layer
_MATRIX_KINDS = 4  # shapes of a layer's matrices
_READ_BYTES = 16 * 2**20
_ROUNDING_BYTES = 8 * 2**20  # scratch of rounding, which the heap keeps
_ROUNDING_ALONE_BYTES = 4 * 2**20  # on one thread
_MEDIA_CACHE_BYTES = 256 * 2**20
_PUBLISHED_MAX_PIXELS = 6177 * 28 * 28
_FLOAT = 4
# Of csrc: columns that matrices are multiples of, outputs side by side, keys of a span, tokens of a run whose spans are
# kept apart, and what each thread of attention works in.
_COLUMNS, _PANEL, _KEY_SPAN, _QUERY_TILE = 32, 64, 1024, 16
_SCRATCH_BYTES = 2**20


def runs_natively(spec: ModelSpec, preset: QuantPreset, dtype: DtypeName) -> bool:
    """Whether the native kernels, where there are any, take all layers of a model whose hidden states are `dtype`."""
    known = {"bfloat16": (None, "int8", "int4"), "float32": ("int8", "int4"), "float16": ()}[dtype]
    mlps = {(part, width) for uses in _mlps(spec) for part, _, width in uses}
    matrices: set[tuple[Part, int]] = {("attention", spec.hidden_size), ("attention", spec.num_heads * spec.head_dim)}
    matrices |= mlps | {(part, spec.hidden_size) for part, _ in mlps}
    return (
        all(columns % _COLUMNS == 0 and preset.scheme(part, columns) in known for part, columns in matrices)
        and all(width % _PANEL == 0 for _, width in mlps)
        and spec.head_dim % _COLUMNS == 0
    )


def workspace_bytes(
    spec: ModelSpec,
    preset: QuantPreset,
    *,
    bytes_per_value: int,
    context_tokens: int,
    max_batch: int,
    kv_dtype: str,
    max_pixels: int | None = None,
    has_draft: bool = False,
    native: bool = False,
) -> int:
    """Most bytes of intermediate values of a step, and the rotary table, 4 · S · D; without `native` kernels also code
    that torch compiles for numbers of rows.

    A step is a chunk of the longest prompt, which may be scored; or a token of every row, with a draft also those that
    are checked; or the encoding of a picture of `max_pixels`, None for the published limit, where the model sees.
    Features are counted for as many pictures as fit the prompts of a batch.
    """
    encoding = features = 0
    if spec.vision is not None:
        side = math.isqrt(max_pixels or _PUBLISHED_MAX_PIXELS) // spec.vision.patch_size
        encoding = encoding_bytes((1, side, side), spec, bytes_per_value)
        features = min(context_tokens * max_batch * spec.hidden_size * bytes_per_value, _MEDIA_CACHE_BYTES)
    chunk, most_rows = min(PREFILL_CHUNK_TOKENS, context_tokens), max_batch + MAX_STEP_GUESSES * has_draft
    if native:
        native_steps = _NativeSteps(spec, preset, bytes_per_value, context_tokens)
        most = native_steps.most(chunk, most_rows) + int(_HEAP_SHARE * encoding) + _rounding_bytes(preset)
    else:
        linears = 0 if preset.linear in ("int4", "nf4") else _MATRIX_KINDS
        row_counts = max(0, most_rows - _COMPILED_ROWS) + 2 * (context_tokens > PREFILL_CHUNK_TOKENS)
        compiled = (1 + linears) * _COMPILED_BYTES * row_counts + _LAYER_BYTES * spec.num_layers
        steps = _Steps(spec, preset, bytes_per_value, context_tokens, kv_dtype)
        fullest = max(steps.step(chunk, min(chunk, SCORED_ROWS)), steps.step(most_rows, most_rows), encoding)
        most = int(_HEAP_SHARE * fullest) + compiled
    if not native or spec.vision is not None:
        most += _TORCH_BYTES
    return most + features + angle_bytes(spec, context_tokens)


def angle_bytes(spec: ModelSpec, context_tokens: int) -> int:
    """Of a rotary table, cos and sin."""
    return _FLOAT * context_tokens * spec.head_dim


def mtp_bytes(spec: ModelSpec, *, bytes_per_value: int, context_tokens: int, max_batch: int) -> int:
    """Most bytes that the head for multi-token prediction keeps and works with beside its weights and its KV cache.

    Of a chunk of tokens, and of one of each row, 8 · h · b: states that wait, the same joined, embeddings, the norms of
    both, these side by side (2), and their projection. And its rotary table. Its layer works in what the model's layers
    work in.
    """
    num_tokens = PREFILL_CHUNK_TOKENS + max_batch
    return num_tokens * 8 * spec.hidden_size * bytes_per_value + angle_bytes(spec, context_tokens)


def loading_bytes(spec: ModelSpec, preset: QuantPreset, *, bytes_per_value: int, native: bool = False) -> int:
    """Most bytes that loading needs beside the weights: the buffer that the widest matrix of a layer is read into
    before it is packed or rounded, that of its codes, blocks of files, and scratch of rounding.

    Embedding and head are rounded block by block. What stays in the model's dtype is read into its place with `native`
    kernels.
    """
    rounding = _rounding_bytes(preset)
    if native and not rounding:
        return _READ_BYTES
    hidden = spec.hidden_size
    widest = max(2 * spec.intermediate_size, (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim)
    # The kernels copy int4 codes to their place, between the scales.
    codes = widest * hidden // 2 if native and "int4" in (preset.linear, preset.experts) else 0
    return widest * hidden * bytes_per_value + codes + _READ_BYTES + rounding


def reading_bytes(
    spec: ModelSpec,
    preset: QuantPreset,
    *,
    bytes_per_value: int,
    stored_bytes: int,
    is_stored_quantised: bool,
    context_tokens: int,
    max_batch: int,
    native: bool = False,
) -> int:
    """Most bytes that reading experts from disk needs while running, of which one has `stored_bytes` in the files.

    Experts are added up once all have arrived: a step of n tokens keeps the outputs of K of them and of the shared MLP,
    n · (K + 1) · h in float32. Each reader has what it reads in a buffer, unless that goes straight to its place, as
    int4 of packed folders does with `native` kernels. What must be put into another order needs one for the widest
    matrix, too, and what is rounded on the way less than in `loading_bytes`: a reader rounds without torch's threads.
    """
    banks = [bank for bank in (spec.experts, None if spec.vision is None else spec.vision.experts) if bank is not None]
    num_tokens = max(min(PREFILL_CHUNK_TOKENS, context_tokens), max_batch)
    outputs = num_tokens * (max(bank.experts_per_token for bank in banks) + 1) * spec.hidden_size * _FLOAT
    if is_stored_quantised and native and preset.experts == "int4":
        return outputs
    widest = 2 * max(bank.intermediate_size for bank in banks) * spec.hidden_size
    staged = 0
    if not is_stored_quantised and (preset.experts is not None or not native):
        staged += widest * bytes_per_value
    if not is_stored_quantised and preset.experts is not None:
        staged += _ROUNDING_ALONE_BYTES + (widest // 2 if native and preset.experts == "int4" else 0)
    return outputs + NUM_EXPERT_READERS * (stored_bytes + staged)


def _rounding_bytes(preset: QuantPreset) -> int:
    return 0 if preset.linear is None and preset.experts is None else _ROUNDING_BYTES


def _mlps(spec: ModelSpec) -> list[list[tuple[Part, int, int]]]:
    """For each kind of layer the MLPs that work together: part, rows for each token, width."""
    kinds: list[list[tuple[Part, int, int]]] = []
    experts = spec.experts
    has_experts = [experts is not None and experts.in_layer(layer) for layer in range(spec.num_layers)]
    if not all(has_experts):
        kinds.append([("dense_mlp", 1, spec.intermediate_size)])
    if experts is not None and any(has_experts):
        width = experts.num_shared_experts * experts.intermediate_size
        shared: list[tuple[Part, int, int]] = [("shared_experts", 1, width)] if width else []
        banks = [experts] if spec.vision is None else [experts, spec.vision.experts]
        kinds += [[("routed_experts", bank.experts_per_token, bank.intermediate_size), *shared] for bank in banks]
    return kinds


class _NativeSteps:
    """Bytes of steps on the native kernels: one block of memory for what a call works with, kept at its largest, and
    beside it hidden states and logits."""

    def __init__(self, spec: ModelSpec, preset: QuantPreset, bytes_per_value: int, context_tokens: int) -> None:
        self.spec, self.preset, self.b, self.context_tokens = spec, preset, bytes_per_value, context_tokens

    def most(self, chunk_tokens: int, most_rows: int) -> int:
        """Of a chunk of one prompt, and of a token of every row."""
        few = max(most_rows, _QUERY_TILE)
        attention = max(self._attention(chunk_tokens), self._attention(few) + self._partials(few)) + _SCRATCH_BYTES
        mlp = max(self._mlp(uses, max(chunk_tokens, most_rows)) for uses in _mlps(self.spec))
        head = self._rows("head", most_rows, self.spec.hidden_size)
        scored = min(chunk_tokens, SCORED_ROWS)
        return max(attention, mlp, head) + max(self._around(chunk_tokens, scored), self._around(most_rows, most_rows))

    def _around(self, n: int, num_wanted: int) -> int:
        """x and its angles; float32 logits, and two more rows of them while a token is drawn."""
        spec = self.spec
        logits = (num_wanted + 2) * spec.vocab_size * _FLOAT
        return n * (spec.hidden_size * self.b + 2 * spec.head_dim * _FLOAT) + logits

    def _rows(self, part: Part, n: int, width: int) -> int:
        """Rows in the form that a matrix takes: bfloat16; or bytes, with a scale and an offset for each row, in "int4"
        for each group."""
        scheme = self.preset.scheme(part, width)
        if scheme is None:
            return n * width * 2
        return n * (width + 2 * _FLOAT * (width // INT4_GROUP if scheme == "int4" else 1))

    def _attention(self, n: int) -> int:
        """norm(x); query, key and value, and what attention gives, in float32; its rows."""
        spec = self.spec
        attended, heads = spec.num_heads * spec.head_dim, 2 * spec.num_heads + 2 * spec.num_kv_heads
        rows = self._rows("attention", n, spec.hidden_size) + self._rows("attention", n, attended)
        return rows + n * heads * spec.head_dim * _FLOAT

    def _partials(self, n: int) -> int:
        """Of every token, head and span of the keys a sum, its maximum and its share."""
        spans = -(-self.context_tokens // _KEY_SPAN)
        return n * self.spec.num_heads * spans * (self.spec.head_dim + 2) * _FLOAT

    def _mlp(self, uses: list[tuple[Part, int, int]], n: int) -> int:
        """norm(x) in each form; silu(gate) · up in float32, and its rows."""
        hidden = self.spec.hidden_size
        forms = {self.preset.scheme(part, hidden): self._rows(part, n, hidden) for part, _, _ in uses}
        wide = sum(n * rows * width * _FLOAT + self._rows(part, n * rows, width) for part, rows, width in uses)
        return sum(forms.values()) + wide


class _Steps:
    """Bytes in use at the fullest point of a step on torch's products."""

    def __init__(
        self, spec: ModelSpec, preset: QuantPreset, bytes_per_value: int, context_tokens: int, kv_dtype: str
    ) -> None:
        self.spec, self.preset, self.b = spec, preset, bytes_per_value
        self.context_tokens, self.kv_dtype = context_tokens, kv_dtype

    def step(self, num_tokens: int, num_wanted: int) -> int:
        """n tokens, of which so many have their logits."""
        spec = self.spec
        kinds = {spec.experts is not None and spec.experts.in_layer(layer) for layer in range(spec.num_layers)}
        mlp = max(self._experts(num_tokens) if kind else self._dense(num_tokens) for kind in kinds)
        residual = 2 * num_tokens * spec.hidden_size * self.b  # x and its norm
        return max(residual + max(self._attention(num_tokens), mlp), self._logits(num_wanted))

    def _attention(self, n: int) -> int:
        """Query, key and value, and while they are rotated a copy in float32 and two products of half its size; or a
        sequence's attention, with an int8 cache its keys and values in the model's dtype."""
        spec = self.spec
        heads, rotated = spec.num_heads + 2 * spec.num_kv_heads, spec.num_heads + spec.num_kv_heads
        qkv = n * heads * spec.head_dim * self.b
        rotating = qkv + n * rotated * spec.head_dim * (self.b + 2 * _FLOAT)
        read = 2 * spec.num_kv_heads * self.context_tokens * spec.head_dim * self.b if self.kv_dtype == "int8" else 0
        attending = qkv + n * (rotated + 2 * spec.num_heads) * spec.head_dim * self.b + read
        product = self._product("attention", n, spec.hidden_size, heads * spec.head_dim)
        return max(rotating, attending, product)

    def _dense(self, n: int) -> int:
        return self._mlp("dense_mlp", n, self.spec.intermediate_size)

    def _experts(self, n: int) -> int:
        """Sums and one expert's results in float32, at worst of all tokens; then the shared experts."""
        spec, experts = self.spec, self.spec.experts
        assert experts is not None
        bank = self._mlp("routed_experts", n, experts.intermediate_size)
        routed = n * spec.hidden_size * (2 * _FLOAT + 2 * self.b) + bank
        return max(routed, self._mlp("shared_experts", n, experts.num_shared_experts * experts.intermediate_size))

    def _mlp(self, part: Part, n: int, width: int) -> int:
        """Gate and up; silu beside them; down beside what they gave."""
        hidden = self.spec.hidden_size
        wide = n * width * self.b
        return max(self._product(part, n, hidden, 2 * width), 3 * wide, wide + self._product(part, n, width, hidden))

    def _logits(self, num_wanted: int) -> int:
        """In the model's dtype and in float32, and two more of one row while its token is drawn."""
        vocab, hidden = self.spec.vocab_size, self.spec.hidden_size
        kept = num_wanted * vocab * _FLOAT + 2 * vocab * _FLOAT
        return kept + self._product("head", num_wanted, hidden, vocab)

    def _product(self, part: Part, n: int, in_features: int, out_features: int) -> int:
        """The result, and what the scheme needs to get there."""
        result = n * out_features * self.b
        scheme = self.preset.scheme(part, in_features)
        scaled = 2 * _FLOAT * min(n * out_features, _SCALED_VALUES)
        if scheme is None:
            return result
        if scheme == "int8":
            return result + n * in_features * (_FLOAT + 1) + 2 * scaled
        if scheme == "int4":
            table = 2 * out_features * (in_features // INT4_GROUP) * self.b
            return result + 2 * table + 2 * scaled
        if scheme == "nf4":
            return result + out_features * in_features * self.b
        return result + n * in_features * (_FLOAT + 1) + 2 * _FLOAT * n * out_features
