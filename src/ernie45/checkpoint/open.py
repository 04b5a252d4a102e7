"""Opening a checkpoint folder: everything that config.json and the headers tell, before a weight is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ernie45.checkpoint.headers import CheckpointIndex, read_headers, read_json
from ernie45.checkpoint.layouts import Layout, detect_layout
from ernie45.checkpoint.quantized_releases import refuse_by_config, refuse_by_tensors
from ernie45.checkpoint.read import hold_the_same
from ernie45.errors import TensorError
from ernie45.spec import ModelSpec
from ernie45.types.reports import IgnoredTensor

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A folder's spec, stored tensors and layout. `duplicates` are tensors left out of `index`, with the reason."""

    folder: Path
    spec: ModelSpec
    index: CheckpointIndex
    layout: Layout
    duplicates: tuple[IgnoredTensor, ...] = ()

    def account_for(self, unread: Iterable[str]) -> tuple[IgnoredTensor, ...]:
        """Say of each stored tensor that a build did not ask for why that is right, beside the duplicates.

        Raises:
            TensorError: there is no reason; the model of this config has no place for the tensor.
        """
        return (*self.duplicates, *(_ignored(key, self.layout) for key in unread))


def read_config(folder: Path) -> Mapping[str, Any]:
    """Read config.json. Raises ConfigError, or UnsupportedError when it says that the weights are quantised."""
    config = read_json(folder / "config.json")
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
    layout = detect_layout(index, config, spec)
    head, embedding = index.tensors.get(_HEAD), index.tensors.get(layout.locate(_EMBEDDING).key)
    if head is None or embedding is None or spec.tied is False or not hold_the_same(head, embedding):
        return Checkpoint(folder=folder, spec=spec, index=index, layout=layout)
    others = {key: info for key, info in index.tensors.items() if key != _HEAD}
    return Checkpoint(
        folder=folder,
        spec=spec,
        index=replace(index, tensors=MappingProxyType(others)),
        layout=layout,
        duplicates=(IgnoredTensor(name=_HEAD, reason=f"equal to {embedding.name}, which serves as the head"),),
    )


def _ignored(key: str, layout: Layout) -> IgnoredTensor:
    if key.endswith("rotary_emb.inv_freq"):
        return IgnoredTensor(name=key, reason="computed from rope_theta")
    if all(name.startswith("model.mtp_") for name in layout.names_in(key)):
        return IgnoredTensor(name=key, reason="multi-token-prediction head, which plain decoding does without")
    raise TensorError(
        f"the checkpoint holds a tensor {key!r} that a model of this config has no place for",
        hint="config.json and the weight files do not belong together, or the checkpoint is a variant to report",
    )
