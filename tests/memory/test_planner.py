from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from ernie45.catalogue import find
from ernie45.errors import InvalidRequestError
from ernie45.memory.budget import in_words, kv_bytes_per_token
from ernie45.memory.placement import DeviceMemory
from ernie45.memory.plan import PART_NAMES, MemoryPlan
from ernie45.memory.planner import make_plan, with_speed
from ernie45.memory.sizing import DraftNeeds, PlanRequest, Sizing
from ernie45.memory.streaming import RecordedRouting
from ernie45.memory.workspace import RUNTIME_BYTES
from ernie45.presets import PRESETS
from ernie45.types.streaming import ExpertSlots
from tests.memory.test_streaming import in_blocks

GB = 10**9
GIB = 2**30
BIG = 1000 * GIB


def request(name: str = "ERNIE-4.5-0.3B-PT", preset: str = "none", **fields: Any) -> PlanRequest:
    entry = find(name)
    assert entry is not None
    capacities = fields.pop("memory", {"cpu": 24 * GIB})
    defaults: dict[str, Any] = {
        "model": name,
        "spec": entry.spec,
        "preset": PRESETS.get(preset),
        "dtype": "bfloat16",
        "kv_dtype": "auto",
        "context_tokens": None,
        "max_batch": None,
        "devices": tuple(DeviceMemory(name=device, capacity_bytes=size) for device, size in capacities.items()),
        "has_own_head": not entry.spec.tied,
    }
    return PlanRequest(**{**defaults, **fields})


def plan(name: str = "ERNIE-4.5-0.3B-PT", preset: str = "none", **fields: Any) -> MemoryPlan:
    return make_plan(request(name, preset, **fields))


def smallest(**fields: Any) -> int:
    """Memory in which the 0.3B just fits."""
    return plan(memory={"cpu": BIG}, **fields).peak_bytes


def test_native_kernels_need_less_where_they_serve() -> None:
    for preset in ("none", "int8", "int4"):
        there, gone = (plan(preset=preset, native=native) for native in (True, False))
        assert 0 < there.workspace_bytes < gone.workspace_bytes - 14 * 2**20
    assert plan(native=True).loading_bytes < plan(native=False).loading_bytes
    assert plan(native=True, dtype="float16").peak_bytes == plan(native=False, dtype="float16").peak_bytes
    assert plan(preset="nf4", native=True).peak_bytes == plan(preset="nf4", native=False).peak_bytes


def test_with_room_for_all_the_defaults_are_taken() -> None:
    made = plan()
    assert (made.verdict, made.context_tokens, made.max_batch, made.remedies) == ("fits", 8192, 32, ())
    assert made.kv_bytes == 8192 * 32 * kv_bytes_per_token(request().spec, bytes_per_value=2, kv_dtype="auto")
    assert made.weight_bytes == made.disk_bytes == 2 * 360_748_032
    assert tuple(made.parts) == PART_NAMES
    assert made.parts["runtime"] == RUNTIME_BYTES
    assert made.peak_bytes <= 24 * GIB
    assert plan("tiny-dense").context_tokens == 4096


def test_rows_give_way_before_tokens() -> None:
    five = plan(memory={"cpu": smallest(max_batch=5)})
    assert (five.context_tokens, five.max_batch, five.verdict) == (8192, 5, "fits")
    four = plan(memory={"cpu": smallest(max_batch=5) - 1})
    assert (four.context_tokens, four.max_batch) == (8192, 4)
    short = plan(memory={"cpu": smallest(max_batch=1) - 1})
    assert (short.max_batch, short.verdict) == (1, "fits")
    assert 8000 < short.context_tokens < 8192
    least = smallest(context_tokens=256, max_batch=1)
    assert plan(memory={"cpu": least}).context_tokens >= 256
    assert plan(memory={"cpu": least - 1}).verdict == "does not fit"


def test_what_is_asked_for_is_kept() -> None:
    asked: dict[str, Any] = {"context_tokens": 1000, "max_batch": 40}
    assert plan(**asked).kv_bytes == 40 * 1024 * 18_432  # whole blocks of 32 tokens
    refused = plan(**asked, memory={"cpu": smallest(**asked) - 1})
    assert (refused.context_tokens, refused.max_batch, refused.verdict) == (1000, 40, "does not fit")


@pytest.mark.parametrize("asked", [{"context_tokens": 131073}, {"context_tokens": 0}, {"max_batch": 0}])
def test_what_cannot_be_asked_for(asked: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError):
        plan(**asked)


def test_the_longest_context_and_the_largest_batch_just_fit() -> None:
    made = plan(context_tokens=1024, max_batch=16, memory={"cpu": 2 * GIB})
    for tokens, verdict in ((made.longest_context_tokens, "fits"), (made.longest_context_tokens + 1, "does not fit")):
        assert plan(context_tokens=tokens, max_batch=16, memory={"cpu": 2 * GIB}).verdict == verdict
    for rows, verdict in ((made.largest_batch, "fits"), (made.largest_batch + 1, "does not fit")):
        assert plan(context_tokens=1024, max_batch=rows, memory={"cpu": 2 * GIB}).verdict == verdict
    nothing = plan(memory={"cpu": GIB // 2})
    assert (nothing.longest_context_tokens, nothing.largest_batch, nothing.verdict) == (0, 0, "does not fit")


def test_an_int8_kv_cache_takes_about_half() -> None:
    whole, half = plan(), plan(kv_dtype="int8")
    assert (whole.kv_dtype, half.kv_dtype) == ("bfloat16", "int8")
    assert half.kv_bytes == whole.kv_bytes * 130 // 256


def test_auto_is_the_best_quality_that_fits() -> None:
    chosen = [plan("ERNIE-4.5-21B-A3B-PT", "auto", memory={"cpu": size * GIB}).preset for size in (48, 24, 16, 4)]
    assert chosen == ["none", "int8", "int4", "int4"]
    on_gpu = [plan("ERNIE-4.5-21B-A3B-PT", "auto", memory={"cuda:0": size * GB}).preset for size in (48, 24, 16)]
    assert on_gpu == ["none", "bnb-int8", "nf4"]


def test_a_model_larger_than_memory_streams_its_experts() -> None:
    made = plan("ERNIE-4.5-300B-A47B-PT", "int4", context_tokens=8192, native=True)
    assert (made.verdict, made.max_batch, made.tokens_per_second) == ("streams", 1, None)
    assert made.num_experts == ExpertSlots(text=51 * 64)
    assert made.expert_slots is not None
    held, every = made.expert_slots.text, 51 * 64
    stored, scales = 3 * 8192 * 3584 // 2, 3 * 8192 * 3584 // 32 + 4 * (2 * 3584 + 8192)
    codes = in_blocks(stored + scales) - scales
    assert made.parts["routed_experts"] == held * codes
    assert made.weight_bytes == made.disk_bytes - every * (stored + scales) + held * (codes + scales)
    # What an expert takes would not fit beside a fiftieth of the capacity and what importing took.
    spare_bytes = 24 * GIB - 24 * GIB // 50 - 192 * 2**20 - made.peak_bytes
    assert 0 <= spare_bytes < codes + scales
    assert made.expert_hit_rate == held / every
    assert made.expert_read_bytes == 51 * 8 * (every - held) * 2 * 3 * 8192 * 3584 // every, "bfloat16, as in the files"
    assert made.bottleneck == f"speed: {in_words(made.expert_read_bytes)} of experts are read from disk for each token"
    assert "3.8 times the bytes" in made.notes[0]
    assert made.devices[0].expert_layers == tuple(range(3, 54))
    for disk, verdict in ((made.disk_bytes, "streams"), (made.disk_bytes - 1, "does not fit")):
        named = plan("ERNIE-4.5-300B-A47B-PT", "int4", free_disk_bytes=disk)
        assert (named.verdict, named.free_disk_bytes) == (verdict, disk)


def test_what_a_packed_folder_streams() -> None:
    asked: dict[str, Any] = {"name": "ERNIE-4.5-21B-A3B-PT", "preset": "int4", "native": True, "context_tokens": 8192}
    expert_bytes = 3 * 2560 * 1536 // 2 + 3 * 2560 * 1536 // 32 + 4 * (2 * 1536 + 2560)
    held = []
    for size in (4, 6, 8):
        made = plan(**asked, is_stored_quantised=True, memory={"cpu": size * GIB})
        rounded = plan(**asked, memory={"cpu": size * GIB})
        assert (made.verdict, made.notes) == ("streams", ())
        assert made.expert_slots is not None
        assert rounded.expert_slots is not None
        assert made.expert_slots.text > rounded.expert_slots.text, "no room for rounding"
        missing = 27 * 64 - made.expert_slots.text
        assert made.expert_read_bytes == 27 * 6 * missing * expert_bytes // (27 * 64)
        assert made.peak_bytes < size * GIB
        held.append(made.expert_slots.text)
    assert [later - earlier for earlier, later in pairwise(held)] == pytest.approx([2.1e9 / expert_bytes] * 2, abs=2)
    assert plan(**asked, is_stored_quantised=True, memory={"cpu": 12 * GIB}).expert_slots is None


def test_both_banks_of_a_model_that_sees_have_a_share() -> None:
    made = plan("ERNIE-4.5-VL-28B-A3B-PT", "int4", memory={"cpu": 8 * GIB}, native=True, is_stored_quantised=True)
    assert made.num_experts == ExpertSlots(text=27 * 64, vision=27 * 64)
    assert made.expert_slots is not None
    text, vision = made.expert_slots.text, made.expert_slots.vision
    assert 0 < text < 27 * 64
    assert abs(text - vision) <= 1
    sizes = []
    for width in (1536, 512):
        scales = 3 * 2560 * width // 32 + 4 * (2 * width + 2560)
        sizes.append(in_blocks(3 * 2560 * width // 2 + scales) - scales)
    assert made.parts["routed_experts"] == text * sizes[0] + vision * sizes[1]


def test_limits_of_a_plan_that_streams_are_those_within_which_it_does() -> None:
    asked: dict[str, Any] = {"name": "ERNIE-4.5-21B-A3B-PT", "preset": "int4", "memory": {"cpu": 4 * GIB}}
    made = plan(**asked)
    most = made.longest_context_tokens
    assert most > made.context_tokens == 8192
    assert plan(**asked, context_tokens=most).verdict == "streams"
    assert plan(**asked, context_tokens=most + 1).verdict == "does not fit"
    assert plan(**asked, context_tokens=8192, max_batch=made.largest_batch).verdict == "streams"
    assert plan(**asked, context_tokens=8192, max_batch=made.largest_batch + 1).verdict == "does not fit"


def test_a_draft_takes_room_from_the_experts() -> None:
    asked: dict[str, Any] = {"name": "ERNIE-4.5-21B-A3B-PT", "preset": "int4", "memory": {"cpu": 6 * GIB}}
    alone, drafted = (plan(**asked, draft=draft) for draft in (None, DraftNeeds(model=request(preset="int8"))))
    assert drafted.parts["draft"] == plan(preset="int8").weight_bytes
    assert alone.expert_slots is not None
    assert drafted.expert_slots is not None
    taken = drafted.peak_bytes - drafted.parts["routed_experts"] - drafted.parts["scales"]
    taken -= alone.peak_bytes - alone.parts["routed_experts"] - alone.parts["scales"]
    assert alone.expert_slots.text - drafted.expert_slots.text == pytest.approx(taken / 6_291_456, abs=1)


def test_recorded_routing_says_what_a_token_finds_in_memory() -> None:
    asked: dict[str, Any] = {"name": "ERNIE-4.5-21B-A3B-PT", "preset": "int4", "memory": {"cpu": 6 * GIB}}
    uniform = plan(**asked)
    tried = []

    def hit_rate(slots: int) -> float:
        tried.append(slots)
        return 0.75

    recorded = RecordedRouting(num_tokens=99, num_layers=27, num_experts=64, num_chosen=6, hit_rate=hit_rate)
    made = plan(**asked, routing=recorded)
    assert (made.expert_hit_rate, made.routing_tokens, uniform.routing_tokens) == (0.75, 99, None)
    assert made.expert_slots is not None
    assert made.expert_slots == uniform.expert_slots
    assert tried == [made.expert_slots.text], "replaying takes a while"
    assert made.expert_read_bytes == 27 * 6 // 4 * 2 * 3 * 2560 * 1536 + 2 * 2 * 3 * 2560 * 1536 // 4
    assert f"{in_words(made.expert_read_bytes)} of experts are read" in made.bottleneck
    whole = plan(**{**asked, "memory": {"cpu": 24 * GIB}}, routing=recorded)
    assert (whole.verdict, whole.expert_hit_rate, whole.routing_tokens) == ("fits", None, None)


def test_experts_stream_to_the_cpu_even_beside_a_gpu() -> None:
    """Where the kernels serve: the plan is that of the CPU by itself."""
    asked: dict[str, Any] = {"name": "ERNIE-4.5-300B-A47B-PT", "native": True, "context_tokens": 8192}
    both = {"cuda:0": 8 * GB, "cpu": 24 * GIB}
    for preset in ("int4", "auto"):
        made = plan(preset=preset, memory=both, **asked)
        alone = plan(preset="int4", memory={"cpu": 24 * GIB}, **asked)
        assert (made.verdict, made.placement.devices, made.preset) == ("streams", ("cpu",), "int4")
        assert replace(made, remedies=()) == replace(alone, remedies=())
    assert made.remedies != alone.remedies, "which still count the GPU"
    banks = [
        Sizing(request("ERNIE-4.5-300B-A47B-PT", "int4", memory=memory, native=True), PRESETS["int4"]).banks
        for memory in (both, {"cpu": 24 * GIB})
    ]
    assert banks[0] == banks[1]


def test_a_gpu_takes_part_in_what_fits() -> None:
    """As torch computes, whatever kernels the CPU has; and with fewer tokens before experts stream."""

    def beside_a_gpu(gib: float, **fields: Any) -> MemoryPlan:
        return plan("ERNIE-4.5-21B-A3B-PT", "auto", memory={"cuda:0": 8 * GB, "cpu": int(gib * GIB)}, **fields)

    made = beside_a_gpu(6, native=True)
    assert (made.verdict, made.preset, made.placement.devices) == ("fits", "nf4", ("cuda:0", "cpu"))
    assert made == beside_a_gpu(6, native=False)
    short = beside_a_gpu(5.3)
    assert (short.verdict, short.preset) == ("fits", "nf4")
    assert short.context_tokens < 8192
    assert plan("ERNIE-4.5-21B-A3B-PT", "int4", memory={"cpu": int(5.3 * GIB)}).verdict == "streams"


def test_on_disk_what_is_not_quantised_keeps_the_dtype_of_the_files() -> None:
    kept = plan("ERNIE-4.5-21B-A3B-PT", "int4", dtype="bfloat16")
    wide = plan("ERNIE-4.5-21B-A3B-PT", "int4", dtype="float32", stored_dtype="bfloat16")
    assert wide.weight_bytes > kept.weight_bytes
    assert wide.disk_bytes == kept.disk_bytes == kept.weight_bytes
    exact: Any = {"embedding": 5 * GIB}
    assert plan(dtype="float32", stored_dtype="bfloat16", weights=exact).disk_bytes == 5 * GIB - 2 * 360_748_032


def test_what_does_not_stream() -> None:
    assert plan("ERNIE-4.5-300B-A47B-PT", "none", free_disk_bytes=50 * GB).verdict == "does not fit"
    assert plan("ERNIE-4.5-300B-A47B-PT", "int4", memory={"cpu": 6 * GIB}).verdict == "does not fit"
    assert plan("ERNIE-4.5-300B-A47B-PT", "int4", memory={"cuda:0": 24 * GB}).verdict == "does not fit"
    assert plan("ERNIE-4.5-0.3B-PT", memory={"cpu": GIB // 2}).verdict == "does not fit"  # dense


def test_the_experts_of_two_layers_must_fit_beside_the_rest() -> None:
    """8 of 64 experts of a layer at a time."""
    asked: dict[str, Any] = {"name": "ERNIE-4.5-300B-A47B-PT", "preset": "int4", "context_tokens": 8192, "max_batch": 1}
    made = plan(**asked)
    assert made.expert_slots is not None
    expert_bytes = 3 * 8192 * 3584 // 2 + 3 * 8192 * 3584 // 32 + 4 * (2 * 3584 + 8192)
    least = int((made.peak_bytes - (made.expert_slots.text - 2 * 8) * expert_bytes + 192 * 2**20) / 0.98)
    fewest = plan(**asked, memory={"cpu": least + 1000})
    assert (fewest.verdict, fewest.expert_slots) == ("streams", ExpertSlots(text=16))
    assert plan(**asked, memory={"cpu": least - 1000}).verdict == "does not fit"


def test_an_open_batch_leaves_the_gpu_to_the_weights() -> None:
    memory = {"cuda:0": 24 * GB, "cpu": 256 * GB}
    made = plan("ERNIE-4.5-300B-A47B-PT", "int4", memory=memory)
    gpu, cpu = made.devices
    assert (gpu.device, gpu.layers, cpu.layers) == ("cuda:0", tuple(range(54)), ())
    assert 1 <= made.max_batch < 32
    assert gpu.parts["kv_cache"] == made.kv_bytes
    assert cpu.expert_layers == tuple(sorted(set(range(3, 54)) - set(gpu.expert_layers)))
    assert made.bottleneck.startswith("speed: cpu reads")
    assert all(device.peak_bytes <= device.capacity_bytes for device in made.devices)


def test_parts_of_all_devices_are_the_whole_model() -> None:
    one = plan("ERNIE-4.5-21B-A3B-PT", "none", memory={"cpu": 60 * GIB}, max_batch=1)
    two = plan("ERNIE-4.5-21B-A3B-PT", "none", memory={"cuda:0": 24 * GB, "cuda:1": 24 * GB}, max_batch=1)
    assert two.weight_bytes == one.weight_bytes
    assert {part: two.parts[part] for part in PART_NAMES[:11]} == {part: one.parts[part] for part in PART_NAMES[:11]}
    assert sum(len(device.layers) for device in two.devices) == 28
    assert (two.placements, two.placement.devices) == (two.devices, ("cuda:0", "cuda:1"))


def test_the_bytes_that_a_build_found_count() -> None:
    exact: Any = {"embedding": 5 * GIB}
    made = plan(weights=exact)
    assert made.weight_bytes == 5 * GIB
    assert made.parts["attention"] == 0


def seconds(timed: MemoryPlan) -> float:
    """Of a token."""
    assert timed.tokens_per_second is not None
    return 1 / timed.tokens_per_second


def test_speed_is_nearly_the_bandwidth_over_the_bytes_of_a_token() -> None:
    made = plan(context_tokens=1000, max_batch=4)
    timed = with_speed(made, lambda: 20e9, no_disk)
    assert seconds(timed) == pytest.approx((2 * 360_748_032 + 500 * 18_432) / (0.88 * 20e9) + 0.001, rel=1e-3)
    assert timed.memory_read_rate == 20e9
    assert replace(timed, tokens_per_second=None, memory_read_rate=None) == made
    on_gpu = plan(memory={"cuda:0": 24 * GB})
    assert with_speed(on_gpu, lambda: 20e9, no_disk) is on_gpu
    too_large = plan(memory={"cpu": GIB // 2})
    assert with_speed(too_large, lambda: 20e9, no_disk) is too_large


def no_disk() -> float:
    raise AssertionError("nothing streams")


def test_a_token_waits_for_the_disk_and_then_for_memory() -> None:
    made = plan("ERNIE-4.5-21B-A3B-PT", "int4", memory={"cpu": 6 * GIB})
    timed = with_speed(made, lambda: 20e9, lambda: 2e9)
    assert (timed.memory_read_rate, timed.disk_read_rate) == (20e9, 2e9)
    assert made.expert_read_bytes is not None
    from_memory = made.devices[0].token_bytes
    whole = plan("ERNIE-4.5-21B-A3B-PT", "int4", memory={"cpu": 24 * GIB}, context_tokens=8192, max_batch=1)
    assert from_memory == whole.devices[0].token_bytes, "what was read is then used"
    fits = replace(made, expert_read_bytes=None)
    assert seconds(with_speed(fits, lambda: 20e9, no_disk)) == pytest.approx(from_memory / (0.88 * 20e9) + 0.001)
    layers = 0.0007 * len(made.devices[0].expert_layers)
    assert seconds(timed) == pytest.approx(from_memory / (0.88 * 20e9) + 0.001 + layers + made.expert_read_bytes / 2e9)
