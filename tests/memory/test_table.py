from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from ernie45.memory.plan import PART_NAMES, DevicePlan, MemoryPlan
from ernie45.memory.table import LABELS, headline, layer_ranges
from ernie45.types.placement import Placement
from ernie45.types.streaming import ExpertSlots

GIB = 2**30


def made_up_device(name: str = "cpu", *, capacity_bytes: int = 20 * GIB, **parts: int) -> DevicePlan:
    """Layer 0 is dense, 1 to 3 have experts. 7 GiB of weights, 3 GiB beside them; loading takes 1 GiB."""
    usual = {"embedding": GIB, "attention": GIB, "routed_experts": 5 * GIB, "kv_cache": 2 * GIB, "workspace": GIB // 2}
    return DevicePlan(
        device=name,
        capacity_bytes=capacity_bytes,
        parts={**dict.fromkeys(PART_NAMES, 0), **usual, "runtime": GIB // 2, **parts},
        loading_bytes=GIB,
        layers=(0, 1, 2, 3),
        expert_layers=(1, 2, 3),
        token_bytes=2 * 10**9,
    )


def made_up_plan(*devices: DevicePlan, **fields: Any) -> MemoryPlan:
    """One that fits in 20 GiB, and of which half of the capacity is used."""
    usual: dict[str, Any] = {
        "model": "baidu/ERNIE-4.5-9B-PT",
        "preset": "int4",
        "dtype": "bfloat16",
        "kv_dtype": "bfloat16",
        "context_tokens": 8192,
        "max_batch": 1,
        "devices": devices or (made_up_device(),),
        "placement": Placement.on("cpu", 4),
        "disk_bytes": 7 * GIB,
        "free_disk_bytes": None,
        "verdict": "fits",
        "bottleneck": "speed: cpu reads 2 GB for each token",
        "remedies": (),
        "longest_context_tokens": 131072,
        "largest_batch": 6,
        "tokens_per_second": 7.25,
        "memory_read_rate": 14.5e9,
    }
    return MemoryPlan(**{**usual, **fields})


SPLIT = (
    replace(made_up_device("cuda:0", capacity_bytes=8 * GIB, routed_experts=0, runtime=0), expert_layers=()),
    replace(made_up_device("cpu", embedding=0, attention=0, kv_cache=0), layers=()),
)
TOO_LARGE = made_up_plan(
    made_up_device(capacity_bytes=8 * GIB),
    verdict="does not fit",
    bottleneck="memory: cpu may use 8.00 GiB",
    remedies=("It fits with less.", "It fits with " + 20 * "many words " + "in two lines."),
    longest_context_tokens=4096,
    largest_batch=0,
    free_disk_bytes=50 * 10**9,
    tokens_per_second=None,
    memory_read_rate=None,
    notes=("Nobody has <b>seen</b> it.",),
)
STREAMS = made_up_plan(
    verdict="streams",
    bottleneck="speed: 2.00 GiB of experts are read from disk for each token",
    remedies=("It fits with less.",),
    num_experts=ExpertSlots(text=1728),
    expert_slots=ExpertSlots(text=673),
    expert_hit_rate=673 / 1728,
    expert_read_bytes=2 * GIB,
    disk_read_rate=1.5e9,
)


def lines_of(plan: MemoryPlan) -> list[str]:
    return [" ".join(line.split()) for line in plan.explain().splitlines()]


def test_a_plan_that_fits() -> None:
    assert (
        made_up_plan().explain()
        == """\
baidu/ERNIE-4.5-9B-PT as int4, bfloat16, 8,192 tokens x 1: fits, 10.00 GiB of 20.00 GiB

cpu
  embedding          1.00 GiB   10.0%  #####
  attention          1.00 GiB   10.0%  #####
  routed experts     5.00 GiB   50.0%  #########################
  KV cache           2.00 GiB   20.0%  ##########
  workspace         512.0 MiB    5.0%  ##
  runtime           512.0 MiB    5.0%  ##
  while running     10.00 GiB
  while loading      8.50 GiB
  may be used       20.00 GiB

Limits      up to 131,072 tokens with 1 request at a time; up to 6 requests with 8,192 tokens
Speed       about 7.2 tokens/s for one request, estimated from a memory bandwidth of 14.5 GB/s
Bottleneck  speed: cpu reads 2 GB for each token"""
    )


def test_a_plan_that_does_not_fit() -> None:
    lines = lines_of(TOO_LARGE)
    assert lines[:2] == [f"{headline(TOO_LARGE)}:", "does not fit, 10.00 GiB needed, 2.00 GiB too much"]
    assert "Limits up to 4,096 tokens with 1 request at a time; not even 1 request fits with 8,192 tokens" in lines
    assert "Disk 7.5 GB for the weights in this form; 50.0 GB may be used" in lines
    assert "Remedies 1. It fits with less." in lines
    assert lines[-2].startswith("many words")
    assert lines[-1] == "Note Nobody has <b>seen</b> it."
    assert not any(line.startswith("Speed") for line in lines)


def test_a_plan_that_streams() -> None:
    lines = lines_of(STREAMS)
    assert lines[0].endswith("8,192 tokens x 1: streams, 10.00 GiB of 20.00 GiB")
    text = " ".join(lines)
    assert (
        "Experts 673 of 1,728 in memory, 39 %; the others are read from disk as they are needed: 2.00 GiB for each "
        "token, if all are chosen equally often Limits up to 131,072 tokens"
    ) in text
    assert "estimated from a memory bandwidth of 14.5 GB/s and a disk that reads 1.5 GB/s Bottleneck" in text
    assert "Disk 7.5 GB for the weights in this form Remedies 1. It fits with less." in text


def test_experts_for_pictures_are_told_apart() -> None:
    plan = replace(
        STREAMS, num_experts=ExpertSlots(text=1000, vision=1000), expert_slots=ExpertSlots(text=400, vision=500)
    )
    assert "400 of 1,000 for text and 500 of 1,000 for pictures in memory, 45 %;" in " ".join(lines_of(plan))


def test_a_plan_for_recorded_routing_says_so() -> None:
    recorded = replace(STREAMS, expert_hit_rate=0.753, routing_tokens=1234)
    assert (
        "673 of 1,728 in memory, 39 %; the others are read from disk as they are needed: 2.00 GiB for each token, if "
        "75 % of its experts are in memory, as in a routing trace of 1,234 tokens Limits"
    ) in " ".join(lines_of(recorded))
    assert [plan.to_dict()["routing_tokens"] for plan in (STREAMS, recorded)] == [None, 1234]


def test_what_is_not_as_usual_is_named() -> None:
    plan = made_up_plan(preset="none", kv_dtype="int8", max_batch=3)
    head = "baidu/ERNIE-4.5-9B-PT unquantised, bfloat16, KV cache int8, 8,192 tokens x 3:\n  fits, 10.00 GiB of "
    assert plan.explain().startswith(head)
    assert "no context fits with 3 requests at a time" in replace(plan, longest_context_tokens=0).explain()


def test_each_device_has_its_parts() -> None:
    lines = lines_of(made_up_plan(*SPLIT))
    assert lines[0].endswith("fits, 11.00 GiB of 28.00 GiB")
    gpu, cpu = lines.index("cuda:0: layers 0-3"), lines.index("cpu: routed experts of layers 1-3")
    assert lines[gpu + 1] == "embedding 1.00 GiB 22.2% ###########"
    assert lines[cpu + 1] == "routed experts 5.00 GiB 83.3% ##########################################"
    assert lines[cpu - 2] == "may be used 8.00 GiB"


@pytest.mark.parametrize("plan", [TOO_LARGE, STREAMS, made_up_plan(*SPLIT), made_up_plan(model="/m" + 40 * "/folder")])
def test_no_line_is_longer_than_a_terminal_and_none_ends_in_a_space(plan: MemoryPlan) -> None:
    lines = plan.explain().splitlines()
    assert max(map(len, lines)) <= 100
    assert lines == [line.rstrip() for line in lines]


@pytest.mark.parametrize(("speed", "words"), [(2702.4, "2,700"), (36.35, "36"), (7.25, "7.2"), (0.314, "0.31")])
def test_an_estimate_has_two_digits(speed: float, words: str) -> None:
    assert f"about {words} tokens/s" in made_up_plan(tokens_per_second=speed).explain()


@pytest.mark.parametrize(("layers", "words"), [((), ""), ((4,), "4"), ((0, 1, 2, 5, 7, 8), "0-2, 5, 7-8")])
def test_layer_ranges(layers: tuple[int, ...], words: str) -> None:
    assert layer_ranges(layers) == words


def test_every_part_has_a_name_for_people() -> None:
    assert tuple(LABELS) == PART_NAMES


def test_text_is_the_table_and_repr_one_line() -> None:
    plan = made_up_plan()
    assert str(plan) == plan.explain()
    assert repr(plan) == (
        "<MemoryPlan baidu/ERNIE-4.5-9B-PT as int4, bfloat16, 8,192 tokens x 1: fits, 10.00 GiB of 20.00 GiB>"
    )


def test_values_for_programs() -> None:
    plan = replace(TOO_LARGE, devices=SPLIT)
    values = plan.to_dict()
    assert json.loads(plan.to_json()) == values
    assert "\n" in plan.to_json()
    assert (values["model"], values["preset"], values["verdict"]) == (plan.model, "int4", "does not fit")
    assert values["peak_bytes"] == plan.peak_bytes == 11 * GIB
    assert values["part_bytes"] == dict(plan.parts)
    assert values["remedies"] == list(plan.remedies)
    assert values["placement"]["layers"] == ["cpu"] * 4
    assert (values["free_disk_bytes"], values["tokens_per_second"]) == (50 * 10**9, None)
    gpu, cpu = values["devices"]
    assert (gpu["device"], gpu["layers"], gpu["expert_layers"]) == ("cuda:0", [0, 1, 2, 3], [])
    assert (cpu["running_bytes"], cpu["loading_peak_bytes"], cpu["peak_bytes"]) == (
        6 * GIB,
        13 * GIB // 2,
        13 * GIB // 2,
    )


def test_what_the_speed_rests_on() -> None:
    keys = ("memory_bytes_per_second", "disk_bytes_per_second", "expert_hit_rate", "expert_read_bytes", "expert_slots")
    values = STREAMS.to_dict()
    assert [values[key] for key in keys] == [14.5e9, 1.5e9, 673 / 1728, 2 * GIB, {"text": 673, "vision": 0}]
    assert values["num_experts"] == {"text": 1728, "vision": 0}
    assert [made_up_plan().to_dict()[key] for key in keys] == [14.5e9, None, None, None, None]
    assert TOO_LARGE.to_dict()["memory_bytes_per_second"] is None
