from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from ernie45.catalogue import find
from ernie45.memory.budget import Limits
from ernie45.memory.machine import HostMemory
from ernie45.memory.placement import DeviceMemory
from ernie45.memory.planner import make_plan
from ernie45.memory.remedies import refusal
from ernie45.memory.sizing import PlanRequest
from ernie45.presets import PRESETS

GB = 10**9
GIB = 2**30


def request(name: str, preset: str, memory: dict[str, int] | None = None, **fields: Any) -> PlanRequest:
    entry = find(name)
    assert entry is not None
    capacities = memory or {"cpu": 24 * GIB}
    asked: dict[str, Any] = {
        "model": name,
        "spec": entry.spec,
        "preset": PRESETS[preset],
        "dtype": "bfloat16",
        "kv_dtype": "auto",
        "context_tokens": None,
        "max_batch": None,
        "devices": tuple(DeviceMemory(name=device, capacity_bytes=size) for device, size in capacities.items()),
        "has_own_head": not entry.spec.tied,
    }
    return PlanRequest(**{**asked, **fields})


def remedies(asked: PlanRequest) -> tuple[str, ...]:
    return make_plan(asked).remedies


def with_memory(asked: PlanRequest, tenths: int) -> PlanRequest:
    grown = replace(asked.devices[-1], capacity_bytes=tenths * 2**30 // 10)
    return replace(asked, devices=(*asked.devices[:-1], grown))


def check_memory(asked: PlanRequest, remedy: str) -> None:
    """The amount that a remedy names is what is needed, to a tenth of a GiB."""
    found = re.search(r"(\d+)\.(\d) GiB of memory on", remedy)
    assert found is not None
    tenths = int(found[1] + found[2])
    assert make_plan(with_memory(asked, tenths)).verdict == "fits"
    assert make_plan(with_memory(asked, tenths - 1)).verdict != "fits"


def test_what_fits_needs_none() -> None:
    assert remedies(request("ERNIE-4.5-0.3B-PT", "none")) == ()


def test_a_smaller_preset_comes_first_the_best_that_fits() -> None:
    asked = request("ERNIE-4.5-21B-A3B-PT", "none")
    preset, memory = remedies(asked)
    assert preset == "It fits with quantization='int8': the weights then take 20.38 GiB."
    check_memory(replace(asked, context_tokens=make_plan(asked).context_tokens), memory)
    on_gpu = remedies(request("ERNIE-4.5-21B-A3B-PT", "none", {"cuda:0": 16 * GB}))
    assert on_gpu[0].startswith("It fits with quantization='nf4'")


def test_a_kv_cache_that_is_too_large() -> None:
    asked = request("ERNIE-4.5-0.3B-PT", "none", context_tokens=131072, max_batch=16)
    made = make_plan(asked)
    kv, batch, context, memory = made.remedies
    assert kv == "It fits with kv_dtype='int8': the KV cache then takes about half."
    assert batch == f"It fits with max_batch={made.largest_batch} instead of 16."
    assert context == f"It fits with context_tokens={made.longest_context_tokens} instead of 131072."
    check_memory(asked, memory)


def test_a_300b_in_bf16_says_what_would_do() -> None:
    asked = request("ERNIE-4.5-300B-A47B-PT", "none", free_disk_bytes=50 * GB)
    made = make_plan(asked)
    both, memory, disk = made.remedies
    assert both.startswith("It fits with quantization='int4' and ")
    check_memory(replace(asked, preset=PRESETS["int4"]), both)
    check_memory(asked, memory)
    assert disk == (
        "With quantization='int4' and 161 GB of disk its routed experts are read from disk as they are needed."
    )
    streaming = replace(asked, preset=PRESETS["int4"], free_disk_bytes=161 * GB)
    assert make_plan(streaming).verdict == "streams"


def test_what_streams_is_told_what_fits() -> None:
    asked = request("ERNIE-4.5-300B-A47B-PT", "int4")
    made = make_plan(asked)
    (memory,) = made.remedies
    assert (made.verdict, made.context_tokens) == ("streams", 8192)
    check_memory(replace(asked, context_tokens=8192), memory)


def test_more_disk_alone() -> None:
    asked = request("ERNIE-4.5-300B-A47B-PT", "int4", free_disk_bytes=50 * GB)
    disk = remedies(asked)[-1]
    assert disk.startswith("With 161 GB of disk ")
    assert make_plan(replace(asked, free_disk_bytes=161 * GB)).verdict == "streams"


def test_a_smaller_preset_that_streams() -> None:
    asked = request("ERNIE-4.5-300B-A47B-PT", "none", {"cpu": 20 * GIB})
    assert make_plan(asked).verdict == "does not fit"
    preset = remedies(asked)[-1]
    assert preset == "With quantization='int4' its routed experts are read from disk as they are needed."
    assert make_plan(replace(asked, preset=PRESETS["int4"])).verdict == "streams"


def test_beside_a_gpu_it_is_the_cpus_preset_that_streams() -> None:
    asked = request("ERNIE-4.5-300B-A47B-PT", "none", {"cuda:0": 8 * GB, "cpu": 20 * GIB})
    assert make_plan(asked).verdict == "does not fit"
    preset = remedies(asked)[-1]
    assert preset == "With quantization='int4' its routed experts are read from disk as they are needed."
    assert make_plan(replace(asked, preset=PRESETS["int4"])).verdict == "streams"


def test_where_no_single_change_does_a_second_is_named_with_a_preset() -> None:
    asked = request("ERNIE-4.5-21B-A3B-PT", "none", context_tokens=131072, max_batch=4)
    both = remedies(asked)[0]
    found = re.fullmatch(r"It fits with quantization='int4' and max_batch=(\d) instead of 4\.", both)
    assert found is not None
    assert make_plan(replace(asked, preset=PRESETS["int4"], max_batch=int(found[1]))).verdict == "fits"


def test_weights_that_are_stored_quantised_have_no_other_preset() -> None:
    asked = request("ERNIE-4.5-21B-A3B-PT", "int8", {"cpu": 16 * GIB})
    assert "quantization='int4'" in remedies(asked)[0]
    assert not any("quantization" in remedy for remedy in remedies(replace(asked, is_stored_quantised=True)))


HOST = HostMemory(total_bytes=64 * GIB, available_bytes=GIB, limited_by="machine", limit_bytes=None)


def check_sum(message: str) -> None:
    """The GiB that a refusal says are needed are the sum of what it says they are for."""
    total, *parts = (
        float(size) * (1 if unit == "G" else 2**-10)
        for size, unit in re.findall(r"([\d.]+) (G|M)iB", message.partition("), and")[0])
    )
    assert abs(total - sum(parts)) < 0.02


def test_a_refusal_names_what_makes_the_sum() -> None:
    limits = Limits(devices={"cpu": 24 * GIB})
    too_large = request("ERNIE-4.5-300B-A47B-PT", "none", free_disk_bytes=GB)
    loading = refusal(make_plan(too_large), limits, HOST).message
    assert "buffers while loading" in loading
    assert "KV cache" not in loading
    check_sum(loading)
    long = request("ERNIE-4.5-0.3B-PT", "none", {"cpu": GIB}, context_tokens=131072)
    running = refusal(make_plan(long), Limits(devices={"cpu": GIB}), HOST).message
    assert "KV cache for 1 x 131072 tokens" in running
    check_sum(running)


def test_a_refusal_says_who_set_the_limit() -> None:
    plan = make_plan(request("ERNIE-4.5-300B-A47B-PT", "none", free_disk_bytes=GB))
    cgroup = replace(HOST, limited_by="cgroup", limit_bytes=24 * GIB)
    for named, host, text in (
        ({"cpu": 24 * GIB}, cgroup, "there are 24.00 GiB"),
        ({"cpu": 90 * GIB}, HOST, "there are 24.00 GiB in this machine"),
        ({"cpu": 90 * GIB}, cgroup, "there are 24.00 GiB within the limit of this process's memory cgroup"),
        ({}, HOST, "there are 24.00 GiB in this machine"),
        ({}, cgroup, "there are 24.00 GiB within the limit of this process's memory cgroup"),
    ):
        assert refusal(plan, Limits(devices=named), host).message.endswith(text)
