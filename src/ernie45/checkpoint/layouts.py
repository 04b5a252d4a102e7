"""How a checkpoint's files lay their tensors out, and where each -PT tensor lies in them.

The rest of the package knows tensors by their -PT names and in torch's orientation, [out, in]. Baidu's Paddle code
writes two other layouts, in which linear weights are [in, out] and projections are fused:

- "paddle" (the published -Paddle repositories, erniekit): keys begin with `ernie.`; `qkv_proj` is all of q, then k,
  then v, or per head [q|k|v] when there are as many key/value heads as query heads; an untied `lm_head` is [h, V].
- "paddleformers" (PaddleFormers 1.x): keys begin with `model.`, config.json says `"source": "paddle"`; `qkv_proj` holds
  for each key/value head its query heads, then its key and value; `lm_head` is [V, h].

In both, `up_gate_proj` is gate, then up. The rules were checked against logits of Baidu's own code
(tests/parity/test_paddle.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, final

from ernie45.checkpoint.headers import CheckpointIndex
from ernie45.errors import TensorError
from ernie45.spec import ModelSpec

LayoutName = Literal["pt", "paddle", "paddleformers"]

_GATES = (".mlp.gate.weight", ".mlp.gate.weight_1")
_HINT = "fetch config.json and the weight files again from one release; the -PT releases cannot be mistaken"


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Where one -PT tensor lies: all of stored tensor `key`, or only `columns` of its last axis, in this order.

    `transposed`: the file holds [in, out]. `stored_columns` is the length of the axis that `columns` cut, by the spec.
    """

    key: str
    transposed: bool = False
    columns: tuple[slice, ...] | None = None
    stored_columns: int | None = None


class Layout(Protocol):
    """A layout, bound to one checkpoint."""

    @property
    def name(self) -> LayoutName: ...

    def locate(self, name: str) -> Piece:
        """Where the tensor of this -PT name lies, if it is there."""

    def names_in(self, key: str) -> tuple[str, ...]:
        """The -PT names of what a stored tensor holds."""


def detect_layout(index: CheckpointIndex, config: Mapping[str, Any], spec: ModelSpec) -> Layout:
    """Tell the layouts apart by key names and config.json, before anything is read.

    Raises:
        TensorError: the signs contradict one another. A wrong guess would load and give wrong tokens.
    """
    has_ernie_prefix = any(key.startswith("ernie.") for key in index.tensors)
    has_model_prefix = any(key.startswith("model.") for key in index.tensors)
    fused = [key for key in index.tensors if ".qkv_proj." in key or ".up_gate_proj." in key]
    separate = [key for key in index.tensors if ".q_proj." in key or ".gate_proj." in key]
    says_paddleformers = config.get("source") == "paddle"
    version = str(config.get("paddleformers_version") or "")
    if has_ernie_prefix and has_model_prefix:
        raise _contradiction(index, "some tensor names begin with 'ernie.' and some with 'model.'")
    if fused and separate:
        raise _contradiction(index, f"it holds fused projections ({fused[0]}) and separate ones ({separate[0]})")
    if has_ernie_prefix:
        if separate:
            raise _contradiction(index, f"{separate[0]} has the prefix of Paddle files and the name of -PT ones")
        if says_paddleformers or version[:1] not in ("", "0"):
            sign = '"source": "paddle"' if says_paddleformers else f'"paddleformers_version": "{version}"'
            raise _contradiction(
                index, f"its tensor names begin with 'ernie.', but config.json has PaddleFormers' {sign}"
            )
        return _PaddleLayout("paddle", index, spec)
    if fused:
        if not says_paddleformers or version.startswith("0."):
            reason = f"is of PaddleFormers {version}" if says_paddleformers else 'lacks "source": "paddle"'
            raise _contradiction(index, f"its tensor {fused[0]} is PaddleFormers 1.x's, but config.json {reason}")
        return _PaddleLayout("paddleformers", index, spec)
    if says_paddleformers and separate:
        raise _contradiction(index, f'{separate[0]} is a -PT name, but config.json says "source": "paddle"')
    return PtLayout(
        head_transposed=_is_head_transposed("pt", index, spec),
        vision_prefix=_vision_prefix(index),
        has_two_banks=spec.vision is not None,
    )


def _contradiction(index: CheckpointIndex, reason: str) -> TensorError:
    return TensorError(f"cannot tell how {index.folder} lays out its weights: {reason}", hint=_HINT)


@final
class PtLayout:
    """Tensors lie under their -PT names. An untied head may lie the other way round, as the dense models' first remote
    code stored it; the routers of a vision-language model, with its two banks of experts, always do. transformers
    writes `model.` before the names of the vision tower."""

    name: LayoutName = "pt"

    def __init__(
        self, *, head_transposed: bool = False, vision_prefix: str = "vision_model.", has_two_banks: bool = False
    ) -> None:
        self._head = Piece(key="lm_head.weight", transposed=head_transposed)
        self._vision_prefix = vision_prefix
        self._has_two_banks = has_two_banks

    def locate(self, name: str) -> Piece:
        if name == self._head.key:
            return self._head
        if name.startswith("vision_model."):
            return Piece(key=self._vision_prefix + name.removeprefix("vision_model."))
        return Piece(key=name, transposed=self._has_two_banks and name.endswith(_GATES))

    def names_in(self, key: str) -> tuple[str, ...]:
        if key.startswith(self._vision_prefix):
            return ("vision_model." + key.removeprefix(self._vision_prefix),)
        return (key,)


@final
class _PaddleLayout:
    def __init__(self, name: LayoutName, index: CheckpointIndex, spec: ModelSpec) -> None:
        self.name = name
        self._spec = spec
        self._index = index
        self._resampler_prefix = _resampler_prefix(index)
        self._vision_prefix = _vision_prefix(index)
        self._prefix = "ernie." if name == "paddle" else "model."
        self._head = Piece(key="lm_head.weight", transposed=_is_head_transposed(name, index, spec))
        num_groups = spec.num_kv_heads if name == "paddleformers" or spec.num_heads == spec.num_kv_heads else 1
        self._qkv = _qkv_columns(spec, num_groups)
        self._qkv_width = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim

    def locate(self, name: str) -> Piece:
        if name == self._head.key:
            return self._head
        key = self._stored(name)
        if name.startswith(("vision_model.", "model.resampler_model.")):
            info = self._index.tensors.get(key)
            return Piece(key=key, transposed=info is not None and len(info.shape) == 2)
        module, _, kind = key.rpartition(".")
        parent, _, leaf = module.rpartition(".")
        is_weight = kind in ("weight", "weight_1")
        if leaf in self._qkv:
            return Piece(
                key=f"{parent}.qkv_proj.{kind}",
                transposed=is_weight,
                columns=self._qkv[leaf],
                stored_columns=self._qkv_width,
            )
        if leaf in ("gate_proj", "up_proj"):
            width = _mlp_width(self._spec, parent)
            half = slice(0, width) if leaf == "gate_proj" else slice(width, 2 * width)
            return Piece(
                key=f"{parent}.up_gate_proj.{kind}",
                transposed=is_weight,
                columns=(half,),
                stored_columns=2 * width,
            )
        return Piece(key=key, transposed=is_weight and _is_linear(parent, leaf))

    def _stored(self, name: str) -> str:
        for prefix, stored in (
            ("vision_model.", self._vision_prefix),
            ("model.resampler_model.", self._resampler_prefix),
            ("model.", self._prefix),
        ):
            if name.startswith(prefix):
                return stored + name.removeprefix(prefix)
        return name

    def names_in(self, key: str) -> tuple[str, ...]:
        if key.startswith(self._vision_prefix):
            return ("vision_model." + key.removeprefix(self._vision_prefix),)
        if key.startswith(self._resampler_prefix):
            return ("model.resampler_model." + key.removeprefix(self._resampler_prefix),)
        name = "model." + key.removeprefix(self._prefix) if key.startswith(self._prefix) else key
        for fused, leaves in (("qkv_proj", ("q_proj", "k_proj", "v_proj")), ("up_gate_proj", ("gate_proj", "up_proj"))):
            if f".{fused}." in name:
                return tuple(name.replace(f".{fused}.", f".{leaf}.") for leaf in leaves)
        return (name,)


def _mlp_width(spec: ModelSpec, module: str) -> int:
    if spec.experts is None or ".mlp." not in module:
        return spec.intermediate_size
    if module.endswith(".shared_experts"):
        return spec.experts.intermediate_size * spec.experts.num_shared_experts
    number = int(module.rpartition(".")[2])
    if spec.vision is not None and number >= spec.experts.num_experts:
        return spec.vision.experts.intermediate_size
    return spec.experts.intermediate_size


def _vision_prefix(index: CheckpointIndex) -> str:
    """What stands before the names of the vision tower's tensors, where there are any."""
    return _prefix_of(index, ("vision_model.", "model.vision_model.", "ernie.vision_model."))


def _resampler_prefix(index: CheckpointIndex) -> str:
    return _prefix_of(index, ("ernie.resampler_model.", "model.resampler_model.", "resampler_model."))


def _prefix_of(index: CheckpointIndex, candidates: tuple[str, ...]) -> str:
    found = [prefix for prefix in candidates if any(key.startswith(prefix) for key in index.tensors)]
    if len(found) > 1:
        raise _contradiction(index, f"some tensor names begin with {found[0]!r} and some with {found[1]!r}")
    return found[0] if found else candidates[0]


def _is_linear(parent: str, leaf: str) -> bool:
    is_router = leaf == "gate" and parent.endswith(".mlp")
    return leaf in ("o_proj", "down_proj") or is_router or parent.endswith("mtp_linear_proj")


def _is_head_transposed(name: LayoutName, index: CheckpointIndex, spec: ModelSpec) -> bool:
    """Whether the stored head is [h, V]: by the layout's rule where there is one, so that a head that lies the other
    way round, which shows another layout under this one's names, fails to fit."""
    info = index.tensors.get("lm_head.weight")
    if info is None or spec.tied or name == "paddleformers":
        return False
    if name == "paddle" and spec.tied is False:
        return True
    is_square = spec.hidden_size == spec.vocab_size
    if is_square and name == "paddle":
        raise _contradiction(
            index, f"{info.name} {list(info.shape)} is [V, h] if tied, else [h, V]; config.json is silent"
        )
    return not is_square and info.shape == (spec.hidden_size, spec.vocab_size)


def _qkv_columns(spec: ModelSpec, num_groups: int) -> dict[str, tuple[slice, ...]]:
    """Columns of q, k and v in a fused projection of `num_groups` times [q|k|v]."""
    query = spec.num_heads // num_groups * spec.head_dim
    kv = spec.num_kv_heads // num_groups * spec.head_dim
    firsts = [group * (query + 2 * kv) for group in range(num_groups)]
    return {
        "q_proj": tuple(slice(first, first + query) for first in firsts),
        "k_proj": tuple(slice(first + query, first + query + kv) for first in firsts),
        "v_proj": tuple(slice(first + query + kv, first + query + 2 * kv) for first in firsts),
    }
