"""What running and loading need beside the weights and the KV cache: arithmetic on a model's shape.

What was measured, and what the constants are made of: docs/decisions/0016-memory-plan.md. Shape letters: n tokens of a
step, S of the longest sequence, h hidden size, H and Hkv heads, D head width, V vocabulary, b bytes of a number.
"""

from __future__ import annotations

import math

from ernie45.memory.media import encoding_bytes
from ernie45.presets import INT4_GROUP, Part, QuantPreset
from ernie45.spec import ModelSpec

PREFILL_CHUNK_TOKENS = 512
"""Most prompt tokens in a step. Prompts are run in chunks whose edges are multiples of this, whatever else is running,
so that a prompt's numbers depend on the prompt alone."""

RUNTIME_BYTES = 44 * 2**20
"""What the first load and step bring in beyond the state after imports: libraries' code, the tokenizer, heaps."""

_HEAP_SHARE = 1.5  # memory that the heap takes for what is in use at a time: freed pieces of other sizes lie between
_SCALED_VALUES = 2**19  # results that a quantised product scales at a time
_COMPILED_BYTES = 100 * 2**10  # oneDNN's code for a product of one shape, kept
_COMPILED_ROWS = 4  # products of fewer rows are padded to these; their code is in RUNTIME_BYTES
_LAYER_BYTES = 600 * 2**10  # heap that a first step leaves taken for each layer
_MATRIX_KINDS = 4  # shapes of a layer's matrices
_READ_BYTES = 16 * 2**20
_QUANTISING_BYTES = 8 * 2**20
_MEDIA_CACHE_BYTES = 256 * 2**20
_PUBLISHED_MAX_PIXELS = 6177 * 28 * 28
_FLOAT = 4


def workspace_bytes(
    spec: ModelSpec,
    preset: QuantPreset,
    *,
    bytes_per_value: int,
    context_tokens: int,
    max_batch: int,
    kv_dtype: str,
    max_pixels: int | None = None,
) -> int:
    """Most bytes of intermediate values of a step, the rotary table, 4 · S · D, and code compiled for numbers of rows.

    A step is a chunk of the longest prompt, or a token of every row; or the encoding of a picture of `max_pixels`,
    None for the published limit, where the model sees. Features are counted for as many pictures as fit the prompts of
    a batch.
    """
    linears = 0 if preset.linear in ("int4", "nf4") else _MATRIX_KINDS
    row_counts = max(0, max_batch - _COMPILED_ROWS) + 2 * (context_tokens > PREFILL_CHUNK_TOKENS)
    compiled = (1 + linears) * _COMPILED_BYTES * row_counts + _LAYER_BYTES * spec.num_layers
    steps = _Steps(spec, preset, bytes_per_value, context_tokens, kv_dtype)
    prefill = steps.step(min(PREFILL_CHUNK_TOKENS, context_tokens), 1)
    most = max(prefill, steps.step(max_batch, max_batch))
    features = 0
    if spec.vision is not None:
        side = math.isqrt(max_pixels or _PUBLISHED_MAX_PIXELS) // spec.vision.patch_size
        most = max(most, encoding_bytes((1, side, side), spec, bytes_per_value))
        features = min(context_tokens * max_batch * spec.hidden_size * bytes_per_value, _MEDIA_CACHE_BYTES)
    return int(_HEAP_SHARE * most) + features + compiled + _FLOAT * context_tokens * spec.head_dim


def loading_bytes(spec: ModelSpec, preset: QuantPreset, *, bytes_per_value: int) -> int:
    """Most bytes that loading needs beside the weights: the buffer that the widest matrix of a layer is read into
    before it is packed or rounded, blocks of files, and scratch of rounding.

    Embedding and head are rounded block by block.
    """
    hidden = spec.hidden_size
    widest = max(2 * spec.intermediate_size, (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim)
    scratch = 0 if preset.linear is None and preset.experts is None else _QUANTISING_BYTES
    return widest * hidden * bytes_per_value + _READ_BYTES + scratch


class _Steps:
    """Bytes in use at the fullest point of a step."""

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
