from __future__ import annotations

from dataclasses import replace

from ernie45.catalogue import find
from ernie45.memory.estimate import WeightSites, estimate_sites
from ernie45.memory.placement import DeviceMemory, Running, excess_bytes, place, read_bytes, within_host
from ernie45.presets import PRESETS
from ernie45.types.placement import Placement

GB = 10**9
GIB = 2**30
RUNNING = Running(
    kv_layer_bytes=8192 * 2048,
    kv_read_bytes=4096 * 2048,
    workspace_bytes=200 * 2**20,
    loading_bytes=300 * 2**20,
    runtime_bytes=40 * 2**20,
)
BARE = Running(kv_layer_bytes=0, kv_read_bytes=0, workspace_bytes=0, loading_bytes=0, runtime_bytes=0)


def sites_of(name: str, preset: str = "int4") -> WeightSites:
    entry = find(name)
    assert entry is not None
    return estimate_sites(entry.spec, PRESETS[preset], bytes_per_value=2, has_own_head=not entry.spec.tied)


def devices(**capacities: int) -> list[DeviceMemory]:
    """`cuda0=…` is "cuda:0"."""
    names = {name: f"{name[:-1]}:{name[-1]}" if name[-1].isdigit() else name for name in capacities}
    return [DeviceMemory(name=names[name], capacity_bytes=capacities[name]) for name in capacities]


def check_fits(placement: Placement, sites: WeightSites, on: list[DeviceMemory]) -> None:
    assert excess_bytes(placement, sites, on, RUNNING) == 0


def test_a_21b_in_int4_lies_on_a_gpu_of_24_gb() -> None:
    sites, on = sites_of("ERNIE-4.5-21B-A3B-PT"), devices(cuda0=24 * GB, cpu=64 * GB)
    placement = place(sites, on, RUNNING)
    check_fits(placement, sites, on)
    assert placement == Placement.on("cuda:0", 28)


def test_a_300b_in_int4_has_its_attention_on_the_gpu_and_its_experts_on_the_cpu() -> None:
    sites, on = sites_of("ERNIE-4.5-300B-A47B-PT"), devices(cuda0=24 * GB, cpu=256 * GB)
    placement = place(sites, on, RUNNING)
    check_fits(placement, sites, on)
    assert set(placement.layers) == {placement.embedding, placement.head} == {"cuda:0"}
    on_gpu = [layer for layer in range(3, 54) if placement.experts[layer] == "cuda:0"]
    # Beside 6.5 GB of the rest, 0.9 GB of KV cache and what running needs there is room for five layers' 3 GB each.
    assert on_gpu == [3, 4, 5, 6, 7]
    assert {placement.experts[layer] for layer in range(8, 54)} == {"cpu"}


def test_where_attention_cannot_lie_on_the_gpu_whole_layers_go_to_the_cpu() -> None:
    sites, on = sites_of("ERNIE-4.5-300B-A47B-PT"), devices(cuda0=6 * GB, cpu=256 * GB)
    placement = place(sites, on, RUNNING)
    check_fits(placement, sites, on)
    first_on_cpu = placement.layers.index("cpu")
    assert 0 < first_on_cpu < 54
    assert set(placement.layers[first_on_cpu:]) == set(placement.experts[first_on_cpu:]) == {placement.head} == {"cpu"}


def test_two_gpus_are_filled_in_order() -> None:
    sites, on = sites_of("ERNIE-4.5-21B-A3B-PT", "none"), devices(cuda0=24 * GB, cuda1=24 * GB, cpu=64 * GB)
    placement = place(sites, on, RUNNING)
    check_fits(placement, sites, on)
    assert placement.devices == ("cuda:0", "cuda:1")
    split = placement.layers.index("cuda:1")
    assert placement.layers == placement.experts == ("cuda:0",) * split + ("cuda:1",) * (28 - split)
    # One more layer would not fit on the first.
    fuller = replace(placement, layers=("cuda:0",) * (split + 1) + ("cuda:1",) * (27 - split))
    assert excess_bytes(replace(fuller, experts=fuller.layers), sites, on, RUNNING) > 0
    assert placement.head == placement.embedding == "cuda:0"  # the head is the embedding


def test_two_cpu_devices_are_split_like_two_gpus() -> None:
    sites, on = sites_of("tiny-moe"), devices(cpu0=1_700_000, cpu1=3_000_000)
    placement = place(sites, on, BARE)
    assert excess_bytes(placement, sites, on, BARE) == 0
    assert placement.layers[0] == "cpu:0"
    assert placement.layers[-1] == "cpu:1"


def test_an_own_head_comes_last() -> None:
    sites, on = sites_of("ERNIE-4.5-300B-A47B-PT"), devices(cuda0=100 * GB, cuda1=100 * GB)
    placement = place(sites, on, RUNNING)
    check_fits(placement, sites, on)
    assert (placement.embedding, placement.head) == ("cuda:0", "cuda:1")


def test_vision_lies_with_the_embedding() -> None:
    sites, on = sites_of("ERNIE-4.5-VL-28B-A3B-PT"), devices(cuda0=10 * GB, cpu=64 * GB)
    placement = place(sites, on, RUNNING)
    check_fits(placement, sites, on)
    assert placement.vision == placement.embedding == "cuda:0"


def test_the_last_device_takes_what_fits_nowhere() -> None:
    sites, on = sites_of("ERNIE-4.5-21B-A3B-PT"), devices(cuda0=GB, cpu=GB)
    placement = place(sites, on, RUNNING)
    assert placement.layers[-1] == "cpu"
    held = sites.total().total() + 28 * RUNNING.kv_layer_bytes + 2 * (RUNNING.workspace_bytes + RUNNING.runtime_bytes)
    assert held - 2 * GB <= excess_bytes(placement, sites, on, RUNNING) <= held - GB


def test_loading_counts_only_where_it_needs_more_than_running() -> None:
    sites, on = sites_of("tiny-dense"), devices(cpu=0)
    placement, weights = Placement.on("cpu", 4), sites.total().total()
    needs = Running(kv_layer_bytes=10, kv_read_bytes=5, workspace_bytes=100, loading_bytes=139, runtime_bytes=1000)
    assert excess_bytes(placement, sites, on, needs) == weights + 1000 + 140
    assert excess_bytes(placement, sites, on, replace(needs, loading_bytes=150)) == weights + 1000 + 150


def test_a_token_reads_the_chosen_experts_and_the_head_but_not_the_embedding() -> None:
    sites = sites_of("ERNIE-4.5-300B-A47B-PT", "none")
    placement = replace(Placement.on("cuda:0", 54), experts=("cpu",) * 54, embedding="cuda:1")
    read = read_bytes(placement, sites, replace(BARE, kv_read_bytes=7))
    assert read["cpu"] == 51 * 8 * 3 * 8192 * 3584 * 2
    assert read["cuda:1"] == 0
    entry = find("ERNIE-4.5-300B-A47B-PT")
    assert entry is not None
    counted = entry.parameters
    assert sum(read.values()) - 54 * 7 == 2 * counted.active + 2 * counted.router  # the router is in float32


def test_the_first_device_is_never_overfilled() -> None:
    """Whatever its size: what fits nowhere goes to the last."""
    sites = sites_of("tiny-moe")
    for size in range(0, 3_000_000, 9_973):
        on = devices(cpu0=size, cpu1=10 * GB)
        assert excess_bytes(place(sites, on, BARE), sites, on, BARE) == 0


def test_no_more_main_memory_than_there_is() -> None:
    asked = devices(cuda0=24 * GB, cpu0=20 * GB, cpu1=20 * GB)
    assert within_host(asked, 50 * GB) == tuple(asked)
    assert [one.capacity_bytes for one in within_host(asked, 30 * GB)] == [24 * GB, 20 * GB, 10 * GB]
