"""A build without weights: whether a checkpoint has what its model needs, how much that is, and the plan with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from ernie45.backends.base import BuildOptions, Streaming
from ernie45.backends.registry import Architecture
from ernie45.checkpoint.adapter import AdaptedSource, Adapter
from ernie45.checkpoint.expert_reads import expert_readers
from ernie45.checkpoint.open import Checkpoint, open_survey
from ernie45.checkpoint.survey import HeaderSurvey
from ernie45.memory.plan import MemoryPlan
from ernie45.memory.planner import choose_preset, make_plan
from ernie45.memory.sizing import PlanRequest, Sizing
from ernie45.presets import PRESETS, QuantPreset, WeightPart
from ernie45.types.placement import Placement


@dataclass(frozen=True, kw_only=True, slots=True)
class DryBuild:
    """What a build without weights found.

    `survey` has the tensors that the model needs, `weights` their bytes by part as they lie in memory, `read_bytes`
    what loading reads of them; `plan` is made of these, and `options` are for the build that follows it. The `request`
    has no more open preset.
    """

    request: PlanRequest
    survey: HeaderSurvey
    weights: Mapping[WeightPart, int]
    read_bytes: int
    options: BuildOptions
    plan: MemoryPlan


def dry_build(
    architecture: Architecture,
    checkpoint: Checkpoint,
    adapter: Adapter | None,
    request: PlanRequest,
    *,
    mtp: bool,
) -> DryBuild:
    """Build on the "meta" device: raises whatever would stop the real build."""
    source, survey = open_survey(checkpoint, adapter)
    request = replace(request, has_own_head="lm_head.weight" in source or request.spec.tied is False)
    if not architecture.follows_options:
        request = replace(request, preset=PRESETS["none"], devices=request.devices[:1], can_stream=False)
    preset = request.preset or choose_preset(request)
    options = BuildOptions(
        dtype=getattr(torch, request.dtype),
        placement=Placement.on("meta", request.spec.num_layers),
        # What GPTQ has left out stays as it is.
        preset=preset if checkpoint.gptq is None else QuantPreset(name=preset.name),
        context_tokens=1,
        mtp=mtp,
    )
    weights = architecture.build(request.spec, source, options).weight_bytes
    if isinstance(source, AdaptedSource):
        source.check_all_merged()
    request = replace(request, preset=preset, weights=weights)
    plan = make_plan(request)
    read_bytes = survey.read_bytes
    if plan.expert_slots is not None:
        streaming = Streaming(
            slots=plan.expert_slots,
            banks=Sizing(request, preset).banks,
            open_reader=expert_readers(checkpoint, adapter),
        )
        options = replace(options, streaming=streaming)
        source, resident = open_survey(checkpoint, adapter)
        weights = architecture.build(request.spec, source, options).weight_bytes
        read_bytes = resident.read_bytes
    return DryBuild(
        request=request,
        survey=survey,
        weights=weights,
        read_bytes=read_bytes,
        options=replace(options, placement=plan.placement, context_tokens=plan.context_tokens),
        plan=plan,
    )
