"""`ernie45 verify`: what a checkpoint folder holds, whether all of it is understood, and whether answers are right."""

from __future__ import annotations

import math
import os
import platform
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar, final

import torch
from torch import Tensor

from ernie45.backends.base import BuildOptions
from ernie45.backends.registry import find_architecture
from ernie45.checkpoint.headers import CheckpointIndex, read_headers, read_json
from ernie45.checkpoint.open import Checkpoint, open_checkpoint, read_config
from ernie45.checkpoint.resolve import resolve
from ernie45.checkpoint.survey import HeaderSurvey
from ernie45.commands.comparison import compare_with_transformers
from ernie45.commands.conversion_plan import check_config
from ernie45.commands.verify_report import Comparison, TensorGroup, VerifyReport
from ernie45.errors import ErnieError, OutOfMemoryError, TensorError, UnsupportedError
from ernie45.parameters import count_parameters
from ernie45.spec import ModelSpec
from ernie45.tokenizer import load_template, load_tokenizer
from ernie45.types.reports import ReadTensor

_LAYOUT_REASONS = {
    "pt": "projections stored one by one",
    "paddle": "names begin with `ernie.`, projections are fused",
    "paddleformers": 'names begin with `model.`, projections are fused, config.json says `"source": "paddle"`',
}
_UNEXPECTED = "unexpected"
_Result = TypeVar("_Result")


def verify(folder: str | os.PathLike[str], *, compare: bool = True, progress: bool = True) -> VerifyReport:
    """Examine a checkpoint: account for every stored tensor from the headers, and compare logits with transformers.

    What is wrong with it stands in the report's `problems`; the rest of the report is there all the same.

    Args:
        folder: a folder, or a name as `ErnieModel.from_pretrained` takes it.
        compare: run the model and transformers' in float32, where memory allows.
        progress: show bars, where there is a terminal or a notebook.

    Raises:
        ModelNotFoundError: there is no such folder; for a name, what fetching it raises.
    """
    path = resolve(folder, progress=progress, check=check_config)
    problems: list[str] = []
    index = _attempt(problems, lambda: read_headers(path))
    checkpoint = _attempt(problems, lambda: _open(path)) if index is not None else None
    keys = _account(checkpoint, problems) if checkpoint is not None else None
    num_token_ids, tokenizer = _tokenizer(path, checkpoint, problems)
    comparisons: tuple[Comparison, ...] = ()
    note = "not done, because of the problems" if compare else "not asked for"
    if compare and checkpoint is not None and keys is not None and not problems:
        comparisons, note = _compare(checkpoint, keys.num_parameters, num_token_ids, progress, problems)
    spec = checkpoint.spec if checkpoint is not None else None
    layout = checkpoint.layout.name if checkpoint is not None else ""
    hide = _PathHider(path)
    return VerifyReport(
        folder=hide(str(path)) if Path(folder).expanduser().is_dir() else str(folder),
        files={file.name: file.stat().st_size for file in sorted(path.iterdir()) if file.is_file()},
        model=_describe(spec) if spec is not None else "",
        layout=layout,
        layout_reason=_LAYOUT_REASONS.get(layout, ""),
        groups=_groups(index, keys.fates if keys is not None else {}) if index is not None else (),
        dtypes=_dtypes(index) if index is not None else {},
        parameters=_parameters(checkpoint, keys) if checkpoint is not None and keys is not None else "",
        unknown_config_keys=spec.unknown_keys if spec is not None else (),
        tokenizer=hide(tokenizer),
        comparisons=comparisons,
        comparison_note=hide(note),
        problems=tuple(map(hide, problems)),
        versions=_versions(),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Keys:
    """What becomes of each stored tensor, by its name, and the parameters of the model and of its MTP head."""

    fates: Mapping[str, str]
    num_parameters: int
    num_mtp_parameters: int


@final
class _LenientSurvey:
    """A HeaderSurvey that notes what is missing or misshapen and goes on, so that a report names all of it."""

    def __init__(self, survey: HeaderSurvey, problems: list[str]) -> None:
        self._survey = survey
        self._problems = problems

    def __contains__(self, name: object) -> bool:
        return name in self._survey

    def read_into(self, out: Tensor, parts: Mapping[str, int]) -> None:
        first = 0
        for name, num_rows in parts.items():
            try:
                self._survey.read_into(out[first : first + num_rows], {name: num_rows})
            except TensorError as error:
                self._problems.append(_words(error))
            first += num_rows


@final
class _PathHider:
    """Replaces paths of this machine: the folder's by its name, the home's by "~"."""

    def __init__(self, folder: Path) -> None:
        whole = folder.resolve()
        self._shown = {str(whole): whole.name, str(folder): whole.name}
        if len(Path.home().parts) > 1:  # some containers have "/" as home
            self._shown[str(Path.home())] = "~"

    def __call__(self, text: str) -> str:
        for path, shown in self._shown.items():
            text = text.replace(path, shown)
        return text


def _attempt(problems: list[str], call: Callable[[], _Result]) -> _Result | None:
    try:
        return call()
    except ErnieError as error:
        problems.append(_words(error))
        return None


def _words(error: ErnieError) -> str:
    return f"{error.message} ({error.hint})" if error.hint else error.message


def _open(folder: Path) -> Checkpoint:
    config = read_config(folder)
    return open_checkpoint(folder, config, find_architecture(config).parse_spec(config))


def _account(checkpoint: Checkpoint, problems: list[str]) -> _Keys:
    """Ask for every tensor as loading does, and find a reason for each that is left."""
    survey = HeaderSurvey(checkpoint.index, checkpoint.layout)
    architecture = find_architecture(read_json(checkpoint.folder / "config.json"))
    architecture.build(
        checkpoint.spec,
        _LenientSurvey(survey, problems),
        BuildOptions.unquantised(checkpoint.spec, dtype=torch.float32, device="meta"),
    )
    tensors = checkpoint.index.tensors
    fates = {read.key: _fate(read) for read in survey.read()}
    num_parameters = sum(math.prod(tensors[key].shape) for key in fates)
    ignored = [*checkpoint.duplicates]
    for key in survey.unread():
        try:
            ignored += checkpoint.account_for([key])[len(checkpoint.duplicates) :]
        except TensorError as error:
            problems.append(_words(error))
            fates[key] = _UNEXPECTED
    fates |= {tensor.name: f"ignored: {tensor.reason}" for tensor in ignored}
    mtp = [tensor.name for tensor in ignored if "mtp_" in tensor.name]
    return _Keys(
        fates=fates,
        num_parameters=num_parameters,
        num_mtp_parameters=sum(math.prod(tensors[name].shape) for name in mtp),
    )


def _fate(read: ReadTensor) -> str:
    parts = ["read"]
    if len(read.names) > 1:
        leaves = [name.split(".")[-2] for name in read.names]
        parts.append(f"split into {', '.join(leaves)}")
    if read.transposed:
        parts.append("transposed")
    return ", ".join(parts)


def _groups(index: CheckpointIndex, fates: Mapping[str, str]) -> tuple[TensorGroup, ...]:
    """Fold tensors whose names differ in numbers alone; one that nobody accounted for shows as such."""
    counts = Counter(
        (re.sub(r"\d+", "*", key), info.dtype, info.shape, fates.get(key, "not accounted for"))
        for key, info in index.tensors.items()
    )
    return tuple(
        TensorGroup(pattern=pattern, count=count, dtype=dtype, shape=shape, fate=fate)
        for (pattern, dtype, shape, fate), count in sorted(counts.items())
    )


def _dtypes(index: CheckpointIndex) -> dict[str, tuple[int, int]]:
    sizes: dict[str, tuple[int, int]] = {}
    for info in index.tensors.values():
        count, num_bytes = sizes.get(info.dtype, (0, 0))
        sizes[info.dtype] = (count + 1, num_bytes + info.num_bytes)
    return sizes


def _parameters(checkpoint: Checkpoint, keys: _Keys) -> str:
    """The headers' count beside the one that config.json's shape gives."""
    has_head = "lm_head.weight" in checkpoint.index.tensors
    expected = count_parameters(replace(checkpoint.spec, tied=not has_head))
    words = f"{keys.num_parameters:,} by the headers"
    if keys.num_mtp_parameters:
        words += f", and {keys.num_mtp_parameters:,} of the multi-token-prediction head"
    verdict = "as many" if expected.total == keys.num_parameters else f"{expected.total:,}"
    return f"{words}; {verdict} by config.json"


def _tokenizer(folder: Path, checkpoint: Checkpoint | None, problems: list[str]) -> tuple[int, str]:
    """How many ids a prompt can be made of, and what there is, in words."""
    vocab_size = checkpoint.spec.vocab_size if checkpoint is not None else 0
    try:
        tokenizer = load_tokenizer(folder)
        if tokenizer is None:
            return vocab_size, "not found"
        load_template(folder)
    except ErnieError as error:
        problems.append(_words(error))
        return vocab_size, "broken"
    if checkpoint is not None and tokenizer.size > vocab_size:
        problems.append(f"the tokenizer has {tokenizer.size} tokens, but the model only {vocab_size}")
        return vocab_size, f"{tokenizer.size} tokens"
    return tokenizer.size, f"{tokenizer.size} tokens"


def _compare(
    checkpoint: Checkpoint, num_parameters: int, num_token_ids: int, progress: bool, problems: list[str]
) -> tuple[tuple[Comparison, ...], str]:
    try:
        comparisons = compare_with_transformers(
            checkpoint, num_parameters=num_parameters, num_token_ids=num_token_ids, progress=progress
        )
    except (OutOfMemoryError, UnsupportedError) as error:  # what this machine or transformers cannot do
        return (), f"not done: {_words(error)}"
    except ErnieError as error:
        problems.append(_words(error))
        return (), "failed"
    problems += [f"the logits of {each.of} are not transformers'" for each in comparisons if not each.is_close]
    return comparisons, ""


def _describe(spec: ModelSpec) -> str:
    experts = spec.experts
    vision = spec.vision
    kind = "dense" if experts is None else f"{experts.num_experts} experts, {experts.experts_per_token} for each token"
    sees = (
        ""
        if vision is None
        else (
            f"; pictures have {vision.experts.num_experts} experts of their own and a tower of {vision.num_layers} "
            f"layers, hidden size {vision.hidden_size}, {vision.num_heads} heads"
        )
    )
    return (
        f"{spec.model_type}, {kind}, {spec.num_layers} layers, hidden size {spec.hidden_size}, {spec.num_heads} heads "
        f"({spec.num_kv_heads} for keys and values) of {spec.head_dim}, vocabulary {spec.vocab_size}{sees}"
    )


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("ernie45", "torch", "transformers", "safetensors")}
    return {**packages, "Python": platform.python_version(), "on": platform.platform()}
