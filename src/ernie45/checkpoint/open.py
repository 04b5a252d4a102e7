"""Opening a checkpoint folder: everything that config.json and the headers tell, before a weight is read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ernie45.checkpoint.adapter import AdaptedSource, Adapter
from ernie45.checkpoint.gptq import GptqSource
from ernie45.checkpoint.gptq_config import GptqConfig, read_gptq_config, with_quantize_config
from ernie45.checkpoint.headers import CheckpointIndex, TensorInfo, read_headers, read_json
from ernie45.checkpoint.layouts import Layout, PtLayout, detect_layout
from ernie45.checkpoint.packed import PackedCheckpointSource
from ernie45.checkpoint.packed_config import read_packed_config
from ernie45.checkpoint.progress import Advance
from ernie45.checkpoint.quantized_releases import refuse_by_config, refuse_by_tensors
from ernie45.checkpoint.read import TensorReader, TensorSource, hold_the_same
from ernie45.checkpoint.staged_reads import StagedReader
from ernie45.checkpoint.survey import HeaderSurvey
from ernie45.errors import TensorError, UnsupportedError
from ernie45.presets import QuantPreset
from ernie45.spec import ModelSpec
from ernie45.types.reports import IgnoredTensor

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_EXPERT = re.compile(r"model\.layers\.\d+\.mlp\.experts\.\d+\.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A folder's spec, stored tensors and layout.

    `duplicates` are tensors left out of `index`, with the reason. `preset` is what the files are packed with, in our
    own format; `gptq` how GPTQ's matrices are stored in them. Both are None where the weights are not quantised.
    """

    folder: Path
    spec: ModelSpec
    index: CheckpointIndex
    layout: Layout
    duplicates: tuple[IgnoredTensor, ...] = ()
    preset: QuantPreset | None = None
    gptq: GptqConfig | None = None

    def account_for(self, unread: Iterable[str]) -> tuple[IgnoredTensor, ...]:
        """Say of each stored tensor that a build did not ask for why that is right, beside the duplicates.

        Raises:
            TensorError: there is no reason; the model of this config has no place for the tensor.
        """
        return (*self.duplicates, *(_ignored(key, self.layout) for key in unread))


def read_config(folder: Path) -> Mapping[str, Any]:
    """Read config.json. Raises ConfigError, or UnsupportedError when it says that the weights are quantised as nothing
    here reads them."""
    config = with_quantize_config(read_json(folder / "config.json"), folder)
    refuse_by_config(config, folder.name)
    return config


def open_checkpoint(folder: Path, config: Mapping[str, Any], spec: ModelSpec) -> Checkpoint:
    """Read the headers of a checkpoint folder, whose config.json gave `config` and `spec`, and tell its layout.

    A stored output head that equals the embedding bit for bit, as Paddle's tied files have it, is left out unless the
    config says that they are two.

    Raises:
        CheckpointError: or one of its kinds: no folder of weights, a damaged file, an unclear layout.
        UnsupportedError: the weights are quantised.
    """
    index = read_headers(folder)
    refuse_by_tensors(index)
    preset = read_packed_config(config)
    layout = detect_layout(index, config, spec) if preset is None else PtLayout(has_two_banks=spec.vision is not None)
    checkpoint = Checkpoint(
        folder=folder, spec=spec, index=index, layout=layout, preset=preset, gptq=read_gptq_config(config)
    )
    head, embedding = index.tensors.get(_HEAD), index.tensors.get(layout.locate(_EMBEDDING).key)
    if head is None or embedding is None or spec.tied is False or not hold_the_same(head, embedding):
        return checkpoint
    others = {key: info for key, info in index.tensors.items() if key != _HEAD}
    return replace(
        checkpoint,
        index=replace(index, tensors=MappingProxyType(others)),
        duplicates=(IgnoredTensor(name=_HEAD, reason=f"equal to {embedding.name}, which serves as the head"),),
    )


def expert_tensors(checkpoint: Checkpoint) -> Mapping[str, tuple[TensorInfo, ...]]:
    """The stored tensors that each routed expert is made of, by the start of its -PT names, in file order:
    "model.layers.3.mlp.experts.17."."""
    found: dict[str, dict[str, TensorInfo]] = {}
    for key, info in checkpoint.index.tensors.items():
        for name in checkpoint.layout.names_in(key):
            match = _EXPERT.match(name)
            if match is not None:
                found.setdefault(match[0], {})[key] = info
    return {prefix: tuple(infos.values()) for prefix, infos in found.items()}


def open_source(
    checkpoint: Checkpoint,
    adapter: Adapter | None = None,
    *,
    advance: Advance | None = None,
    reader: StagedReader | None = None,
) -> TensorSource:
    """What a build reads a checkpoint's weights from, with `adapter` merged. `advance`, if given, is told the bytes
    read.

    With a `reader`, which then reads all of it, the source is for one thread, and a packed matrix may lie in what is
    staged, until the next is. `advance` is then told of packed matrices only.

    Raises:
        UnsupportedError: there is an adapter, and the weights are quantised.
    """
    tensors = TensorReader(checkpoint.index, checkpoint.layout, advance=advance, ranges=reader)
    return _source_over(tensors, checkpoint, adapter, advance, reader)


def open_survey(checkpoint: Checkpoint, adapter: Adapter | None = None) -> tuple[TensorSource, HeaderSurvey]:
    """What a build on the "meta" device asks in place of `open_source`, and the survey that keeps what it asked for.

    Raises as `open_source` does.
    """
    survey = HeaderSurvey(checkpoint.index, checkpoint.layout)
    return _source_over(survey, checkpoint, adapter), survey


def _source_over(
    tensors: TensorSource,
    checkpoint: Checkpoint,
    adapter: Adapter | None,
    advance: Advance | None = None,
    reader: StagedReader | None = None,
) -> TensorSource:
    source = tensors
    if checkpoint.preset is not None:
        source = PackedCheckpointSource(tensors, checkpoint.index, checkpoint.preset, advance=advance, reader=reader)
    elif checkpoint.gptq is not None:
        source = GptqSource(tensors, checkpoint.index, checkpoint.layout, checkpoint.gptq)
    if adapter is None:
        return source
    if source is not tensors:
        raise UnsupportedError(
            f"the adapter in {adapter.folder} cannot be merged: the weights in {checkpoint.folder} are quantised",
            hint="load the unquantised checkpoint with adapter= and quantization=, and save that if need be",
        )
    return AdaptedSource(source, adapter)


def _ignored(key: str, layout: Layout) -> IgnoredTensor:
    if key.endswith("rotary_emb.inv_freq"):
        return IgnoredTensor(name=key, reason="computed from rope_theta")
    if all(name.startswith("model.mtp_") for name in layout.names_in(key)):
        return IgnoredTensor(name=key, reason="multi-token-prediction head, which only draft='mtp' uses")
    raise TensorError(
        f"the checkpoint holds a tensor {key!r} that a model of this config has no place for",
        hint="config.json and the weight files do not belong together, or the checkpoint is a variant to report",
    )
