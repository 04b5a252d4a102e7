"""What a conversion will write, worked out before it writes anything."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ernie45.backends.base import BuildOptions
from ernie45.backends.registry import find_architecture
from ernie45.checkpoint.headers import INDEX_FILE
from ernie45.checkpoint.layouts import PtLayout
from ernie45.checkpoint.open import Checkpoint, open_checkpoint, read_config
from ernie45.checkpoint.packing import PackPlan, Step
from ernie45.checkpoint.survey import HeaderSurvey
from ernie45.checkpoint.write import FolderFiles, Shard, copied_files, index_json, plan_shards, plan_units
from ernie45.commands.media_tokens import media_token_ids
from ernie45.commands.transformers_config import check_transformers_holds, transformers_config
from ernie45.errors import CorruptFileError, UnsupportedError
from ernie45.presets import PRESETS, QuantPreset
from ernie45.saving import plan_saving
from ernie45.spec import ModelSpec

CHECKSUM_FILE = "SHA256SUMS"
_SAMPLE_BYTES = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionPlan:
    """The folder to write, as `pack` says. `digest` stands for all of it and for the source, so that two runs can tell
    whether they are the same."""

    pack: PackPlan
    digest: str
    warnings: tuple[str, ...]


def check_config(folder: Path) -> None:
    """Refuse by config.json alone, before weights are fetched. Raises ConfigError or UnsupportedError."""
    config = read_config(folder)
    find_architecture(config).parse_spec(config)


def plan_conversion(folder: Path, preset: QuantPreset, *, max_shard_bytes: int) -> ConversionPlan:
    """Check a checkpoint folder as loading does, and lay out what it becomes: with the preset "none" a -PT folder as
    transformers reads it, with another a packed one.

    Raises:
        CheckpointError: or one of its kinds: what loading would refuse.
        UnsupportedError: transformers could not hold it, or the weights are quantised, or matrices of the preset have
            no place in files.
    """
    if preset == PRESETS["none"]:
        pack, warnings = _plan_pt(folder, max_shard_bytes)
    else:
        pack, warnings = plan_saving(folder, preset, max_shard_bytes=max_shard_bytes), ()
    return ConversionPlan(pack=pack, digest=_digest(pack), warnings=warnings)


def _plan_pt(folder: Path, max_shard_bytes: int) -> tuple[PackPlan, tuple[str, ...]]:
    """A folder without packed matrices, and warnings."""
    config = read_config(folder)
    architecture = find_architecture(config)
    checkpoint = open_checkpoint(folder, config, architecture.parse_spec(config))
    if checkpoint.preset is not None or checkpoint.gptq is not None:
        raise UnsupportedError(
            f"{folder} holds quantised weights, which a -PT folder has no place for",
            hint="convert the unquantised checkpoint that it was made of",
        )
    spec, index, layout = checkpoint.spec, checkpoint.index, checkpoint.layout
    survey = HeaderSurvey(index, layout)
    architecture.build(spec, survey, BuildOptions.unquantised(spec, dtype=torch.bfloat16, device="meta"))
    mtp = {key for key in survey.unread() if all(name.startswith("model.mtp_") for name in layout.names_in(key))}
    dropped = tuple(tensor for tensor in checkpoint.account_for(survey.unread()) if tensor.name not in mtp)
    left_out = {tensor.name for tensor in dropped}
    names = [name for key in index.tensors if key not in left_out for name in layout.names_in(key)]
    check_transformers_holds(spec, names)

    units = plan_units(index, layout, names, PtLayout(has_two_banks=spec.vision is not None))
    for unit in units:  # the survey has not asked for the multi-token-prediction head
        survey.read_into(torch.empty(unit.shape, device="meta"), unit.rows)
    shards = plan_shards([(unit,) for unit in units], max_shard_bytes)
    small_files = _small_files(folder, config, checkpoint, shards, tied="lm_head.weight" not in names)
    pack = PackPlan(
        checkpoint=checkpoint,
        adapter=None,
        steps=tuple(Step(units=(unit,)) for unit in units),
        files=FolderFiles(shards=shards, small_files=small_files),
        dropped=dropped,
    )
    return pack, tuple(_warnings(spec, names))


def config_of(checkpoint: Checkpoint, config: Mapping[str, Any], *, tied: bool) -> dict[str, Any]:
    """A checkpoint's config.json, which holds `config`, as transformers reads it. `tied`: it has no head of its own.

    Raises:
        ConfigError: the tokens that stand for pictures are not known.
        UnsupportedError: transformers cannot express it.
    """
    spec = checkpoint.spec
    text = config if spec.vision is None else {**(config.get("text_config") or {}), **config}
    return transformers_config(
        spec,
        tied=tied,
        dtype=spec.dtype or checkpoint.index.main_dtype,
        pad_token_id=text.get("pad_token_id"),
        media_ids={} if spec.vision is None else media_token_ids(checkpoint.folder, config),
    )


def _small_files(
    folder: Path, config: Mapping[str, Any], checkpoint: Checkpoint, shards: tuple[Shard, ...], *, tied: bool
) -> dict[str, bytes]:
    written = config_of(checkpoint, config, tied=tied)
    files = {"config.json": (json.dumps(written, indent=2) + "\n").encode()}
    weight_map = index_json(shards)
    if weight_map is not None:
        files[INDEX_FILE] = weight_map
    return files | copied_files(folder)


def _digest(pack: PackPlan) -> str:
    """Of what is written, and of the first bytes of every stored tensor: two trainings of one model have the same
    names and shapes."""
    digest = hashlib.sha256()
    for shard in pack.files.shards:
        digest.update(shard.header)
    for name, content in pack.files.small_files.items():
        digest.update(json.dumps([name, len(content)]).encode() + content)
    for info in pack.checkpoint.index.tensors.values():
        wanted = min(_SAMPLE_BYTES, info.num_bytes)
        with info.file.open("rb", buffering=0) as file:
            file.seek(info.start)
            sample = file.read(wanted)
        if len(sample) < wanted:
            raise CorruptFileError(f"{info.file} is cut short inside {info.name!r}", hint="fetch the file again")
        digest.update(json.dumps([info.name, info.num_bytes]).encode() + sample)
    return digest.hexdigest()


def _warnings(spec: ModelSpec, names: list[str]) -> list[str]:
    warnings = []
    if spec.tied and "lm_head.weight" in names:
        warnings.append(
            "config.json says that the output head is the embedding, but the files have another one: it is kept, and "
            "tie_word_embeddings is written as false"
        )
    if spec.unknown_keys:
        warnings.append(f"keys of config.json that ernie45 does not know are left out: {', '.join(spec.unknown_keys)}")
    return warnings
