"""The vision-language backend: what it asks of a checkpoint, and what goes through which part of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from ernie45.backends.base import BuildOptions, MediaBackend, VisionTokens
from ernie45.backends.decoder import DenseMLP, ExpertBank, ExpertMLP, ResidentExperts, Router
from ernie45.backends.text import build_text
from ernie45.backends.vision_language import VisionLanguageBackend, build_vision_language
from ernie45.backends.vision_tower import PatchEmbedding
from ernie45.experts.trace import BankLog, RoutingLog
from ernie45.kernels.linear import DenseLinear
from ernie45.spec import ModelSpec, parse_spec
from tests.backends.test_text import EXPERTS, RandomTensors
from tests.backends.test_text import spec as text_spec

CPU = torch.device("cpu")
CONFIG: dict[str, Any] = {
    "model_type": "ernie4_5_moe_vl",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 60,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "freq_allocation": 4,
    "moe_num_experts": [3, 3],
    "moe_intermediate_size": [20, 12],
    "moe_layer_start_index": [1, 1],
    "moe_k": 2,
    "moe_num_shared_experts": 2,
    "vision_config": {"depth": 1, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 3},
}


def spec(**changes: object) -> ModelSpec:
    return parse_spec({**CONFIG, **changes})


def build(source: RandomTensors, shape: ModelSpec, dtype: torch.dtype = torch.float32) -> VisionLanguageBackend:
    return build_vision_language(
        shape, source, BuildOptions.unquantised(shape, dtype=dtype, device="cpu", context_tokens=64)
    )


def linear(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def test_it_asks_for_every_tensor_of_tower_and_resampler_in_its_shape() -> None:
    source = RandomTensors()
    build(source, spec())
    block, resampler = "vision_model.blocks.0.", "model.resampler_model."
    tower = {
        "vision_model.patch_embed.proj.weight": (16, 588),
        **norm("vision_model.ln", 16),
        **norm(f"{block}norm1", 16),
        **norm(f"{block}norm2", 16),
        **linear(f"{block}attn.qkv", 48, 16),
        **linear(f"{block}attn.proj", 16, 16),
        **linear(f"{block}mlp.fc1", 48, 16),
        **linear(f"{block}mlp.fc2", 16, 48),
    }
    assert {name: shape for name, shape in source.asked.items() if name.startswith("vision_model.")} == tower
    assert {name: shape for name, shape in source.asked.items() if name.startswith(resampler)} == {
        **linear(f"{resampler}spatial_linear.0", 64, 64),
        **linear(f"{resampler}spatial_linear.2", 64, 64),
        **norm(f"{resampler}spatial_linear.3", 64),
        **linear(f"{resampler}temporal_linear.0", 64, 128),
        **linear(f"{resampler}temporal_linear.2", 64, 64),
        **norm(f"{resampler}temporal_linear.3", 64),
        **linear(f"{resampler}mlp", 24, 64),
        f"{resampler}after_norm.weight": (24,),
    }


def test_it_asks_for_both_banks_of_experts() -> None:
    source = RandomTensors()
    build(source, spec())
    prefix = "model.layers.1.mlp."
    asked = {name.removeprefix(prefix): shape for name, shape in source.asked.items() if name.startswith(prefix)}
    widths = {number: 20 if number < 3 else 12 for number in range(6)}
    experts = {
        f"experts.{number}.{name}.weight": (24, width) if name == "down_proj" else (width, 24)
        for number, width in widths.items()
        for name in ("gate_proj", "up_proj", "down_proj")
    }
    assert asked == {
        **experts,
        "gate.weight": (3, 24),
        "gate.weight_1": (3, 24),
        "moe_statics.e_score_correction_bias": (2, 3),
        "shared_experts.gate_proj.weight": (40, 24),  # of the text's width
        "shared_experts.up_proj.weight": (40, 24),
        "shared_experts.down_proj.weight": (24, 40),
    }
    assert "model.layers.0.mlp.gate_proj.weight" in source.asked
    without = RandomTensors()
    build(without, spec(moe_use_aux_free=False, moe_num_shared_experts=None))
    assert not [name for name in without.asked if "moe_statics" in name or "shared" in name]


def test_only_a_backend_with_a_tower_is_given_media() -> None:
    assert isinstance(build(RandomTensors(), spec()), MediaBackend)
    shape = text_spec(**EXPERTS)
    text = build_text(
        shape, RandomTensors(), BuildOptions.unquantised(shape, dtype=torch.float32, device="cpu", context_tokens=8)
    )
    assert not isinstance(text, MediaBackend)


# Experts


def constant(value: float) -> DenseMLP:
    """Gives silu(1) · `value` for every row of ones."""
    gate_up = torch.zeros(2, 4)
    gate_up[:, 0] = 1.0
    return DenseMLP(gate_up=DenseLinear(gate_up), down=DenseLinear(torch.full((4, 1), value)))


def bank(value: float) -> ExpertBank:
    router = Router(weight=torch.zeros(1, 4), correction=None, experts_per_token=1, norm_min=1e-12)
    log = BankLog(log=RoutingLog(1), layer=1, bank="text")
    return ExpertBank(router=router, experts=ResidentExperts(experts=(constant(value),)), device=CPU, log=log)


@pytest.mark.parametrize("routed", [[], [0], [1, 2], [3, 0], [0, 1, 2, 3]])
def test_tokens_of_pictures_go_through_their_own_experts_and_all_through_the_shared(routed: list[int]) -> None:
    text = [token for token in range(4) if token not in routed]
    tokens = VisionTokens(
        text=torch.tensor(text, dtype=torch.int64),
        routed=torch.tensor(routed, dtype=torch.int64),
        embedded=torch.empty(0, dtype=torch.int64),
        features=torch.empty(0, 4),
    )
    x = torch.ones(4, 4)
    unit = float(torch.nn.functional.silu(torch.tensor(1.0)))
    alone = ExpertMLP(text=bank(1.0), vision=bank(10.0), shared=None)(x, tokens)
    expected = torch.tensor([10.0 if token in routed else 1.0 for token in range(4)]) * unit
    torch.testing.assert_close(alone, expected[:, None].expand(4, 4))
    shared = ExpertMLP(text=bank(1.0), vision=bank(10.0), shared=constant(100.0))(x, tokens)
    torch.testing.assert_close(shared, alone + 100 * unit)
    # Without a picture in the batch all tokens are text.
    torch.testing.assert_close(
        ExpertMLP(text=bank(1.0), vision=bank(10.0), shared=None)(x, None), torch.full((4, 4), unit)
    )


# Tower and resampler


@pytest.fixture(scope="module")
def backend() -> VisionLanguageBackend:
    return build(RandomTensors(), spec())


def patches(*grid: int, seed: int = 0) -> Tensor:
    count = grid[0] * grid[1] * grid[2]
    return torch.randint(0, 256, (count, 588), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


@pytest.mark.parametrize(("grid", "num_tokens"), [((1, 2, 2), 1), ((1, 4, 6), 6), ((2, 2, 4), 2), ((6, 4, 4), 12)])
def test_features_are_as_many_as_tokens(
    backend: VisionLanguageBackend, grid: tuple[int, int, int], num_tokens: int
) -> None:
    features = backend.encode(patches(*grid), grid)
    assert features.shape == (num_tokens, 24)
    assert features.dtype == torch.float32


def test_frames_do_not_see_each_other_and_pairs_are_joined(backend: VisionLanguageBackend) -> None:
    whole = patches(4, 2, 4)
    together = backend.encode(whole, (4, 2, 4))
    apart = torch.cat([backend.encode(half, (2, 2, 4)) for half in whole.split(16)])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)
    swapped = backend.encode(whole.view(2, 2, 8, 588).flip(1).flatten(0, 2), (4, 2, 4))
    assert (swapped - together).abs().max() > 1e-3  # the order within a pair counts


def test_a_picture_goes_with_itself(backend: VisionLanguageBackend) -> None:
    one = patches(1, 4, 2)
    torch.testing.assert_close(
        backend.encode(one, (1, 4, 2)), backend.encode(torch.cat((one, one)), (2, 4, 2)), atol=1e-5, rtol=1e-5
    )


def test_patches_may_be_normalised_already(backend: VisionLanguageBackend) -> None:
    grey = patches(1, 2, 2)
    values = grey.view(4, 3, 196).double() / 255
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], dtype=torch.float64)[:, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711], dtype=torch.float64)[:, None]
    normalised = ((values - mean) / std).flatten(1).float()
    torch.testing.assert_close(
        backend.encode(normalised, (1, 2, 2)), backend.encode(grey, (1, 2, 2)), atol=1e-4, rtol=1e-4
    )


def test_wide_values_are_made_a_part_of_the_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = build(RandomTensors(), spec())
    image = patches(1, 8, 8)
    expected = backend.encode(image, (1, 8, 8))
    monkeypatch.setattr("ernie45.backends.vision_tower._ROWS", 5)
    rows: list[int] = []
    embed = PatchEmbedding._normalized

    def recording(embedding: PatchEmbedding, patches: Tensor) -> Tensor:
        rows.append(len(patches))
        return embed(embedding, patches)

    monkeypatch.setattr(PatchEmbedding, "_normalized", recording)
    torch.testing.assert_close(backend.encode(image, (1, 8, 8)), expected, atol=1e-5, rtol=1e-5)
    assert rows == [5] * 12 + [4]


class Stored(RandomTensors):
    """Gives a tensor the same values whatever it is asked for with, at the scale of trained ones."""

    def read_into(self, out: Tensor, parts: Mapping[str, int]) -> None:
        generator = torch.Generator().manual_seed(sum(map(ord, "".join(parts))))
        values = torch.randn(out.shape, generator=generator) * (0.1 if out.dim() > 1 else 0.3)
        out.copy_(values + (1.0 if "norm" in next(iter(parts)) else 0.0))


def test_in_half_precision_features_stay_near() -> None:
    exact = build(Stored(), spec()).encode(patches(1, 6, 6), (1, 6, 6))
    rounded = build(Stored(), spec(), torch.bfloat16).encode(patches(1, 6, 6), (1, 6, 6))
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.05 * exact.norm()
