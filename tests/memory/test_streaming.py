from __future__ import annotations

from typing import Any

import pytest
import torch

from ernie45.catalogue import find
from ernie45.errors import InvalidRequestError
from ernie45.kernels.library import native_library
from ernie45.kernels.panels import PanelMemory, packed_panels, room_for_panels
from ernie45.memory.streaming import (
    RecordedRouting,
    StreamedBank,
    check_routing,
    share_out,
    streamed_banks,
    token_read_bytes,
    usable_bytes,
)
from ernie45.presets import INT4_GROUP, PRESETS
from ernie45.quantization.packed import empty_packed
from ernie45.spec import ModelSpec, parse_spec

# Layers 1 and 2 have 4 experts of 3 matrices of 32 x 96; a token goes through 2 of them.
CONFIG = {
    "model_type": "ernie4_5_moe", "hidden_size": 96, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 100,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000, "use_bias": False,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "eos_token_id": 2, "moe_num_experts": 4, "moe_k": 2,
    "moe_intermediate_size": 32, "moe_num_shared_experts": 1, "moe_layer_start_index": 1, "moe_layer_end_index": 2,
    "moe_layer_interval": 1,
}  # fmt: skip


def banks(preset: str, spec: ModelSpec | None = None, **fields: Any) -> tuple[StreamedBank, ...]:
    usual: dict[str, Any] = {"bytes_per_value": 2, "bytes_per_stored_value": None, "native": True}
    return streamed_banks(spec or parse_spec(CONFIG), PRESETS[preset], **{**usual, **fields})


def in_blocks(num_bytes: int) -> int:
    """What a slot takes: whole blocks of a disk, and one more, so that it can begin where files want it to."""
    return -(-num_bytes // 4096) * 4096 + 4096


def made_up(num_experts: int = 100, held_bytes: int = 10, least_held: int = 4) -> StreamedBank:
    return StreamedBank(
        num_experts=num_experts,
        num_chosen=20,
        least_held=least_held,
        code_bytes=held_bytes - 2,
        scale_bytes=2,
        stored_bytes=40,
    )


def test_experts_are_counted_over_all_layers() -> None:
    (bank,) = banks("none")
    assert (bank.num_experts, bank.num_chosen, bank.least_held) == (2 * 4, 2 * 2, 2 * 2)
    (single,) = banks("none", parse_spec({**CONFIG, "moe_k": 3, "moe_layer_end_index": 1}))
    assert (single.num_experts, single.num_chosen, single.least_held) == (4, 3, 4)


@pytest.mark.parametrize(
    ("preset", "codes", "scales"),
    [
        # Gate and up have 64 rows of 96, down 96 rows of 32: 128 in panels.
        ("none", 2 * (64 * 96 + 128 * 32), 0),
        ("int8", 64 * 96 + 128 * 32, 4 * (64 + 128)),
        # Beside its own scale a row has one for each group of 32, in dwords: 3 in one, and 1.
        ("int4", (64 * 96 + 128 * 32) // 2, 64 * (4 + 4) + 128 * (4 + 4)),
    ],
)
def test_an_expert_in_panels(preset: str, codes: int, scales: int) -> None:
    (bank,) = banks(preset)
    assert (bank.scale_bytes, bank.held_bytes) == (scales, in_blocks(codes + scales))


@pytest.mark.skipif(native_library() is None, reason="there are no native kernels here")
@pytest.mark.parametrize("preset", ["none", "int8", "int4"])
def test_that_is_what_the_kernels_take(preset: str) -> None:
    (bank,) = banks(preset)
    memory = PanelMemory(torch.empty(bank.held_bytes, dtype=torch.uint8))
    for out_features, in_features in ((64, 96), (96, 32)):
        scheme = PRESETS[preset].scheme("routed_experts", in_features)
        if scheme in ("int8", "int4"):
            packed = empty_packed(scheme, out_features, in_features, INT4_GROUP, torch.device("cpu"), None)
            assert packed_panels(packed, None, memory) is not None
        else:
            room_for_panels(memory, out_features, in_features)
    assert 4096 <= len(memory._rest) < 2 * 4096


def test_an_expert_elsewhere_and_on_disk() -> None:
    (bank,) = banks("int4", native=False)
    codes, scales = 3 * 96 * 32 // 2, 3 * 96 * 32 // 32 + 4 * (64 + 96)
    in_panels = (64 * 96 + 128 * 32) // 2 + 64 * (4 + 4) + 128 * (4 + 4)
    assert (bank.code_bytes, bank.scale_bytes, bank.stored_bytes) == (codes, scales, in_panels)
    (plain,) = banks("int4", bytes_per_stored_value=2)
    assert plain.stored_bytes == 3 * 96 * 32 * 2


def test_a_dense_model_has_none_and_one_that_sees_has_two() -> None:
    for name, widths in (("ERNIE-4.5-0.3B-PT", []), ("ERNIE-4.5-VL-28B-A3B-PT", [1536, 512])):
        entry = find(name)
        assert entry is not None
        assert [bank.held_bytes for bank in banks("int8", entry.spec)] == [
            in_blocks(3 * 2560 * width + 4 * (2 * width + 2560)) for width in widths
        ]


def test_each_bank_has_its_fewest_and_a_share_of_the_rest() -> None:
    large, small = made_up(), made_up(held_bytes=5)
    assert share_out([large], 39) is None
    assert share_out([large], 49) == (4,)
    assert share_out([large], 50) == (5,)
    assert share_out([large], 10**9) == (100,)
    # 4 of each take 60; of the other 1,440 bytes half are there, so half of the 96 that are missing of each.
    assert share_out([large, small], 60 + 720) == (4 + 48, 4 + 48)
    assert share_out([large, small], 59) is None
    assert share_out([made_up(num_experts=4), small], 60 + 5) == (4, 5)
    assert share_out([made_up(num_experts=4)], 50) == (4,)


def test_a_token_reads_those_of_its_experts_that_are_missing() -> None:
    assert token_read_bytes(made_up(), 0.25) == 20 * 0.75 * 40
    assert token_read_bytes(made_up(), 1.0) == 0


def test_routing_of_another_model_is_refused() -> None:
    spec = parse_spec(CONFIG)

    def recorded(num_chosen: int = 2, num_experts: int = 4, num_layers: int = 2) -> RecordedRouting:
        return RecordedRouting(
            num_tokens=9, num_layers=num_layers, num_experts=num_experts, num_chosen=num_chosen, hit_rate=float
        )

    check_routing(recorded(), spec, "mine")
    for other in (recorded(num_chosen=3), recorded(num_experts=5), recorded(num_layers=3)):
        with pytest.raises(
            InvalidRequestError, match=r"of another model: \d of \d experts chosen in \d layers, where mine "
        ):
            check_routing(other, spec, "mine")
    dense = find("ERNIE-4.5-0.3B-PT")
    assert dense is not None
    with pytest.raises(InvalidRequestError, match="but mine has no routed experts"):
        check_routing(recorded(), dense.spec, "mine")


def test_a_margin_is_left() -> None:
    assert usable_bytes(100 * 2**30) == 98 * 2**30 - 192 * 2**20
