from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ernie45.checkpoint.adapter import AdaptedSource, read_adapter
from ernie45.errors import CheckpointError, ConfigError, CorruptFileError, TensorError, UnsupportedError

SIZES = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE_SIZES = SIZES | {
    "moe_intermediate_size": 10,
    "moe_num_experts": 4,
    "moe_k": 2,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": 1,
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
QUERY = "model.layers.0.self_attn.q_proj"


class MemorySource:
    """A TensorSource of -PT tensors in memory."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def read_into(self, out: torch.Tensor, parts: Mapping[str, int]) -> None:
        stacked = torch.cat([self.tensors[name] for name in parts])
        assert [len(self.tensors[name]) for name in parts] == list(parts.values())
        assert stacked.shape == out.shape
        if out.device.type != "meta":
            out.copy_(stacked)


def new_model(*, moe: bool, seed: int = 0) -> Any:
    from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM, Ernie4_5Config, Ernie4_5ForCausalLM

    torch.manual_seed(seed)
    model = Ernie4_5_MoeForCausalLM(Ernie4_5_MoeConfig(**MOE_SIZES)) if moe else None
    model = model or Ernie4_5ForCausalLM(Ernie4_5Config(**SIZES))
    for parameter in model.parameters():  # the router starts at zero, which hides mistakes
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def pt_tensors(model: Any) -> dict[str, torch.Tensor]:
    """A transformers model's weights by -PT names: fused experts taken apart."""
    tensors: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        value = value.detach().clone()
        module, _, leaf = name.rpartition(".")
        if not module.endswith(".mlp.experts"):
            tensors[name] = value
            continue
        for expert, weight in enumerate(value):
            prefix = f"{module}.{expert}."
            if leaf == "down_proj":
                tensors[prefix + "down_proj.weight"] = weight
            else:
                tensors[prefix + "gate_proj.weight"], tensors[prefix + "up_proj.weight"] = weight.chunk(2)
    return tensors


def groups(tensors: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """The names as a backend asks for them: query, key and value together, and gate and up."""
    first_of = {"q_proj": ("q_proj", "k_proj", "v_proj"), "gate_proj": ("gate_proj", "up_proj")}
    result = []
    for name in tensors:
        leaf = name.split(".")[-2]
        if leaf in first_of:
            result.append([name.replace(leaf, part) for part in first_of[leaf]])
        elif leaf not in ("k_proj", "v_proj", "up_proj"):
            result.append([name])
    return result


def read_all(source: AdaptedSource, tensors: Mapping[str, torch.Tensor], **options: Any) -> dict[str, torch.Tensor]:
    result: dict[str, torch.Tensor] = {}
    for names in groups(tensors):
        parts = {name: len(tensors[name]) for name in names}
        out = torch.empty((sum(parts.values()), *tensors[names[0]].shape[1:]), **options)
        source.read_into(out, parts)
        result |= zip(names, out.split(list(parts.values())), strict=True)
    return result


def save_adapter(folder: Path, *, moe: bool, **settings: Any) -> dict[str, torch.Tensor]:
    """Let PEFT save a random adapter, and give what its own merge makes of the model."""
    from peft import LoraConfig, PeftModel, get_peft_model

    config = LoraConfig(**{"r": 3, "lora_alpha": 5, "init_lora_weights": False, **settings})
    get_peft_model(new_model(moe=moe), config).save_pretrained(str(folder))
    return pt_tensors(PeftModel.from_pretrained(new_model(moe=moe), folder).merge_and_unload())


def write_adapter(folder: Path, tensors: Mapping[str, torch.Tensor], **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 5, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {f"base_model.model.{name}": value for name, value in tensors.items()}, folder / "adapter_model.safetensors"
    )
    return folder


def factors(module: str, rows: int, columns: int, rank: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(len(module) + rows)
    return {
        f"{module}.lora_A.weight": torch.randn(rank, columns),
        f"{module}.lora_B.weight": torch.randn(rows, rank),
    }


def assert_merges(folder: Path, base: dict[str, torch.Tensor], merged: dict[str, torch.Tensor]) -> list[str]:
    """Check that reading `base` through the adapter gives `merged`; returns the names that it changed."""
    source = AdaptedSource(MemorySource(base), read_adapter(folder))
    read_all(source, base, device="meta")
    source.check_all_merged()
    result = read_all(source, base)
    assert result.keys() == merged.keys() == base.keys()
    for name, value in merged.items():
        assert (result[name] - value).abs().max() <= 1e-5, name
    changed = [name for name in base if not torch.equal(result[name], base[name])]
    assert sorted(changed) == sorted(read_adapter(folder).names)
    return changed


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ATTENTION + MLP},
        {"target_modules": "all-linear", "use_rslora": True},
        {"target_modules": r".*\.self_attn\.(q|v)_proj", "lora_dropout": 0.1, "exclude_modules": ["model.layers.0"]},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
        {
            "target_modules": ATTENTION + MLP,
            "use_rslora": True,
            "rank_pattern": {r"layers\.1\.self_attn\.(q|k)_proj": 5, "o_proj": 2, "^model.layers.0.mlp.up_proj": 1},
            "alpha_pattern": {"q_proj": 7, r".*\.mlp\..*": 11, "layers.1.self_attn.v_proj": 0.5},
        },
    ],
)
def test_merges_into_a_dense_model_as_peft_does(tmp_path: Path, settings: dict[str, Any]) -> None:
    merged = save_adapter(tmp_path, moe=False, **settings)
    assert assert_merges(tmp_path, pt_tensors(new_model(moe=False)), merged)


@pytest.mark.parametrize(
    ("settings", "num_changed"),
    [
        ({"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}, 12),
        ({"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"], "use_rslora": True}, 8),
        ({"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}, 6),
        ({"target_modules": [*ATTENTION, *MLP]}, 20),
        ({"target_modules": "all-linear"}, 21),
        ({"target_modules": ["gate", "v_proj"]}, 3),
        (
            {
                "target_modules": ["k_proj"],
                "target_parameters": [
                    *(f"mlp.shared_experts.{name}.weight" for name in MLP),
                    "model.layers.0.mlp.up_proj.weight",
                    "mlp.gate.weight",
                ],
                "rank_pattern": {"gate.weight": 2, "shared_experts.up_proj.weight": 4},
                "alpha_pattern": {"mlp.up_proj.weight": 9, "gate": 100},
            },
            7,
        ),
        (
            {
                "target_modules": [],
                "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
                "rank_pattern": {"gate_up_proj": 5},
                "alpha_pattern": {"experts.down_proj": 2},
            },
            12,
        ),
    ],
)
def test_merges_into_a_mixture_of_experts_as_peft_does(
    tmp_path: Path, settings: dict[str, Any], num_changed: int
) -> None:
    merged = save_adapter(tmp_path, moe=True, **settings)
    assert len(assert_merges(tmp_path, pt_tensors(new_model(moe=True)), merged)) == num_changed


def per_expert(base: Mapping[str, torch.Tensor], wanted: Callable[[str], bool]) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in base.items():
        if wanted(name) and name.split(".")[-2] in ATTENTION + MLP:
            tensors |= factors(name.removesuffix(".weight"), *weight.shape)
    return tensors


def test_experts_that_were_modules_merge_as_peft_does(tmp_path: Path) -> None:
    """An adapter trained with transformers 4, where every expert is a module of its own."""
    from peft import PeftModel

    base = pt_tensors(new_model(moe=True))
    tensors = per_expert(base, lambda name: ".experts." in name or "self_attn" in name)
    write_adapter(tmp_path, tensors, target_modules=ATTENTION + MLP)
    merged = pt_tensors(PeftModel.from_pretrained(new_model(moe=True), tmp_path).merge_and_unload())
    assert len(assert_merges(tmp_path, base, merged)) == 20


def test_all_modules_of_a_mixture_of_experts(tmp_path: Path) -> None:
    """As above with the dense layer and the shared experts, which current PEFT leaves out when it reads such a file."""
    base = pt_tensors(new_model(moe=True))
    tensors = per_expert(base, lambda name: True)
    write_adapter(tmp_path, tensors, target_modules=ATTENTION + MLP)
    merged = dict(base)
    for key in tensors:
        module, found, _ = key.partition(".lora_A")
        if found:
            product = tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
            merged[f"{module}.weight"] = base[f"{module}.weight"] + product * 5 / 3
    assert len(assert_merges(tmp_path, base, merged)) == 8 + 3 + 3 + 12


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_in_float32_and_rounds_once(tmp_path: Path, stored: torch.dtype) -> None:
    tensors = {name: value.to(stored) for name, value in factors(QUERY, 32, 24).items()}
    adapter = read_adapter(write_adapter(tmp_path, tensors, target_modules=["q_proj"], use_rslora=True))
    weight = torch.randn(32, 24).bfloat16()
    out = torch.empty(24, 32, dtype=torch.bfloat16).T  # any strides
    AdaptedSource(MemorySource({f"{QUERY}.weight": weight}), adapter).read_into(out, {f"{QUERY}.weight": 32})
    a, b = (tensors[f"{QUERY}.lora_{factor}.weight"].double() for factor in "AB")
    exact = weight.double() + 5 / math.sqrt(3) * (b @ a)
    off = (out.double() - exact).abs()
    assert (off <= exact.abs() * 2**-8 + 1e-6).all()  # half a unit in the last of bfloat16's 8 bits
    assert (out == exact.bfloat16()).float().mean() > 0.99


def test_large_matrices_are_merged_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ernie45.checkpoint.adapter._BLOCK_VALUES", 5 * 24)
    merged = save_adapter(tmp_path, moe=False, target_modules=ATTENTION)
    assert assert_merges(tmp_path, pt_tensors(new_model(moe=False)), merged)


def test_a_dry_run_reads_no_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = read_adapter(write_adapter(tmp_path, factors(QUERY, 32, 24)))
    (tmp_path / "adapter_model.safetensors").unlink()
    base = {f"{QUERY}.weight": torch.zeros(32, 24)}
    source = AdaptedSource(MemorySource(base), adapter)
    source.read_into(torch.empty(32, 24, device="meta"), {f"{QUERY}.weight": 32})
    source.check_all_merged()


def test_the_names_are_those_of_the_source(tmp_path: Path) -> None:
    adapter = read_adapter(write_adapter(tmp_path, factors(QUERY, 32, 24)))
    source = AdaptedSource(MemorySource({"lm_head.weight": torch.zeros(1, 1)}), adapter)
    assert "lm_head.weight" in source
    assert f"{QUERY}.weight" not in source
    assert adapter.names == (f"{QUERY}.weight",)


@pytest.mark.parametrize("module", ["model.layers.2.self_attn.q_proj", "model.layers.0.self_attn.qq_proj", "score"])
def test_a_target_that_the_model_lacks_is_an_error(tmp_path: Path, module: str) -> None:
    adapter = write_adapter(tmp_path, factors(module, 32, 24) | factors(QUERY, 32, 24), base_model_name_or_path="me/it")
    base = pt_tensors(new_model(moe=False))
    source = AdaptedSource(MemorySource(base), read_adapter(adapter))
    read_all(source, base, device="meta")
    with pytest.raises(TensorError, match=rf"1 tensors that the model does not have: {module}.*\n.*'me/it'"):
        source.check_all_merged()


@pytest.mark.parametrize(
    ("experts", "message"), [(2, r"fewer experts .* before 'model.layers.1.mlp.experts.2."), (5, r"experts\.4\.gate")]
)
def test_another_number_of_experts_is_an_error(tmp_path: Path, experts: int, message: str) -> None:
    tensors = factors("model.layers.1.mlp.experts", 20, 24, rank=3 * experts)
    write_adapter(tmp_path, tensors, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"])
    base = pt_tensors(new_model(moe=True))
    source = AdaptedSource(MemorySource(base), read_adapter(tmp_path))
    read_all(source, base, device="meta")
    with pytest.raises(TensorError, match=message):
        source.check_all_merged()


@pytest.mark.parametrize(("rows", "columns"), [(48, 24), (32, 16)])
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_an_adapter_for_another_width_is_an_error(tmp_path: Path, rows: int, columns: int, device: str) -> None:
    adapter = read_adapter(write_adapter(tmp_path, factors(QUERY, rows, columns)))
    source = AdaptedSource(MemorySource({f"{QUERY}.weight": torch.zeros(32, 24)}), adapter)
    with pytest.raises(TensorError, match=rf"{QUERY}.weight' by .*\[{rows}, {columns}\], .* has \[32, 24\]"):
        source.read_into(torch.empty(32, 24, device=device), {f"{QUERY}.weight": 32})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "LOHA"),
        ("peft_type", None),
        ("use_dora", True),
        ("bias", "all"),
        ("lora_bias", True),
        ("fan_in_fan_out", True),
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", [1, 2]),
        ("layer_replication", [[0, 1], [0, 1]]),
        ("alora_invocation_tokens", [5]),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("kasa_config", {"beta": 1e-4}),
        ("monteclora_config", {"n": 1}),
        ("arrow_config", {"top_k": 3}),
        ("megatron_config", {"tp": 2}),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("a_key_of_the_future", "on"),
    ],
)
def test_what_is_no_plain_lora_is_refused_by_name(tmp_path: Path, key: str, value: object) -> None:
    write_adapter(tmp_path, factors(QUERY, 32, 24), **{key: value})
    with pytest.raises(UnsupportedError, match=rf"(?s){key} is .*merge_and_unload"):
        read_adapter(tmp_path)


def test_defaults_of_the_installed_peft_and_off_switches_of_later_ones_pass(tmp_path: Path) -> None:
    from peft import LoraConfig

    config: Any = LoraConfig(r=3)
    settings = config.to_dict() | {"peft_type": "LORA", "a_key_of_the_future": None}
    assert read_adapter(write_adapter(tmp_path, factors(QUERY, 32, 24), **settings)).names == (f"{QUERY}.weight",)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", 0),
        ("r", None),
        ("r", 2.0),
        ("r", True),
        ("lora_alpha", "16"),
        ("lora_alpha", None),
        ("lora_alpha", float("nan")),
        ("lora_alpha", 10**400),
        ("use_rslora", "yes"),
        ("rank_pattern", {"q_proj": -1}),
        ("rank_pattern", ["q_proj"]),
        ("rank_pattern", {"(q_proj": 1}),
        ("rank_pattern", {"(a+)+": 1}),
        ("alpha_pattern", {"q_proj": None}),
        ("alpha_pattern", {".*" * 30: 1}),
        ("alpha_pattern", {"(a|a)" * 30: 1}),
        ("target_modules", [1]),
        ("target_parameters", "mlp.gate.weight"),
    ],
)
def test_a_malformed_setting_is_named(tmp_path: Path, key: str, value: object) -> None:
    write_adapter(tmp_path, factors(QUERY, 32, 24), **{key: value})
    with pytest.raises(ConfigError, match=rf"adapter_config.json: .*{key}"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.embed_tokens.lora_embedding_A", "embedding or the output head"),
        ("lm_head.lora_A.weight", "embedding or the output head"),
        (f"{QUERY}.lora_magnitude_vector.weight", "no factor of a plain LoRA"),
        (f"{QUERY}.lora_B.bias", "no factor of a plain LoRA"),
        (f"{QUERY}.lora_A.default.weight", "no factor of a plain LoRA"),
        ("model.norm.modules_to_save.weight", "no factor of a plain LoRA"),
        ("ernie.layers.0.self_attn.o_proj.lora_A.weight", "Paddle"),
        ("model.layers.0.self_attn.qkv_proj.lora_A.weight", "Paddle"),
    ],
)
def test_other_tensors_are_refused_by_name(tmp_path: Path, name: str, message: str) -> None:
    write_adapter(tmp_path, factors(QUERY, 32, 24) | {name: torch.ones(3, 3)})
    with pytest.raises(UnsupportedError, match=message) as error:
        read_adapter(tmp_path)
    assert name in str(error.value)


def test_tensors_without_peft_prefix_are_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path, {})
    save_file(factors(QUERY, 32, 24), tmp_path / "adapter_model.safetensors")
    with pytest.raises(UnsupportedError, match=f"'{QUERY}.lora_A.weight', which is no factor"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("factor", ["A", "B"])
def test_half_a_pair_is_an_error(tmp_path: Path, factor: str) -> None:
    tensors = factors(QUERY, 32, 24)
    del tensors[f"{QUERY}.lora_{factor}.weight"]
    write_adapter(tmp_path, tensors)
    with pytest.raises(TensorError, match=rf"lacks 'base_model.model.{QUERY}.lora_{factor}.weight'"):
        read_adapter(tmp_path)


def test_an_adapter_without_tensors_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TensorError, match="holds no tensors"):
        read_adapter(write_adapter(tmp_path, {}))


@pytest.mark.parametrize(
    "settings", [{"target_modules": ["q_proj", "w1"]}, {"target_modules": [], "target_parameters": ["w1"]}]
)
def test_a_target_without_tensors_is_an_error(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(TensorError, match="names the target 'w1', but holds no tensors for it"):
        read_adapter(write_adapter(tmp_path, factors(QUERY, 32, 24), **settings))


@pytest.mark.parametrize("targets", [None, ["mlp.experts.down_proj"]])
def test_factors_of_an_unnamed_parameter_are_an_error(tmp_path: Path, targets: list[str] | None) -> None:
    tensors = factors("model.layers.1.mlp.experts.base_layer", 20, 24, rank=12)
    write_adapter(tmp_path, tensors, target_parameters=targets)
    with pytest.raises(TensorError, match="target_parameters does not say"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("settings", [{"r": 4}, {"rank_pattern": {"q_proj": 2}}])
def test_another_rank_than_the_settings_say_is_an_error(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(TensorError, match=rf"{QUERY} has A \[3, 24\] and B \[32, 3\]"):
        read_adapter(write_adapter(tmp_path, factors(QUERY, 32, 24), **settings))


@pytest.mark.parametrize("bad", [torch.ones(3, 24, dtype=torch.int8), torch.ones(72)])
def test_what_is_no_matrix_is_an_error(tmp_path: Path, bad: torch.Tensor) -> None:
    tensors = factors(QUERY, 32, 24) | {f"{QUERY}.lora_A.weight": bad}
    with pytest.raises(TensorError, match="not a matrix of floating-point values"):
        read_adapter(write_adapter(tmp_path, tensors))


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    write_adapter(tmp_path, factors(QUERY, 32, 24))
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="pickles can run code"):
        read_adapter(tmp_path)


def test_a_damaged_file_is_an_error(tmp_path: Path) -> None:
    path = write_adapter(tmp_path, factors(QUERY, 32, 24)) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptFileError, match="cut short"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("missing", ["adapter_model.safetensors", "adapter_config.json"])
def test_an_incomplete_folder_is_an_error(tmp_path: Path, missing: str) -> None:
    write_adapter(tmp_path, factors(QUERY, 32, 24))
    (tmp_path / missing).unlink()
    with pytest.raises(CheckpointError, match=missing):
        read_adapter(tmp_path)


def test_an_adapter_of_paddle_tools_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lora_config.json").write_text("{}")
    with pytest.raises(UnsupportedError, match=r"lora_config\.json, as Paddle's tools write it"):
        read_adapter(tmp_path)
