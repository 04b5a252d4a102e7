"""Layers through torch.compile: on the CPU here, most of them with a compiler that hands back what it is given."""

from __future__ import annotations

import io
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NoReturn

import pytest
import torch
from torch._dynamo.utils import counters

from ernie45 import ErnieModel, QuantPreset, SamplingOptions
from ernie45.backends import compiled
from ernie45.backends.base import Batch, BuildOptions
from ernie45.backends.compiled import CompiledStage, compile_layers
from ernie45.backends.decoder import Attention, Stage
from ernie45.backends.text import TextBackend
from ernie45.backends.vision_language import VisionLanguageBackend
from ernie45.backends.weights import WeightBuilder
from ernie45.memory.draft import Draft
from ernie45.presets import PRESETS
from ernie45.spec import ModelSpec
from ernie45.types.placement import Placement
from ernie45.types.stats import StageClock
from tests.backends import test_placement
from tests.backends.test_placement import CASES, DENSE, MOE, VL, Case, Stored, build, logits

PROMPTS = [[5, 6, 7], list(range(10, 60)), [40], [8, 9] * 20]
GREEDY: SamplingOptions = {"temperature": 0.0, "max_new_tokens": 10, "ignore_eos": True}


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Layers on the CPU are compiled, by a backend that only takes them apart."""
    monkeypatch.setattr(compiled, "_DEVICE_TYPES", ("cpu",))
    torch._dynamo.reset()
    torch.compiler.set_default_backend("aot_eager")
    yield
    torch.compiler.set_default_backend(None)
    torch._dynamo.reset()


def load(
    name: str = "ernie45/tiny-dense",
    *,
    compile: bool = True,
    draft: Draft = None,
    device: str = "cpu",
    show: bool = False,
) -> ErnieModel:
    return ErnieModel.from_pretrained(
        name,
        device=device,
        dtype="float32",
        quantization="none",
        context_tokens=256,
        compile=compile,
        draft=draft,
        progress=show,
    )


def num_compiled() -> int:
    """How often anything was compiled so far."""
    return int(counters["stats"]["unique_graphs"])


def replies(model: ErnieModel) -> list[tuple[int, ...]]:
    """Of all prompts at once, then of one after the other, then of them in pairs."""
    together = [reply.token_ids for reply in model.batch_generate(PROMPTS, **GREEDY)]
    alone = [model.generate(prompt, **GREEDY).token_ids for prompt in PROMPTS]
    pairs = [reply.token_ids for i in (0, 2) for reply in model.batch_generate(PROMPTS[i : i + 2], **GREEDY)]
    assert together == alone == pairs
    return together


@pytest.mark.parametrize(
    ("name", "draft", "num_versions"),
    [("ernie45/tiny-dense", "lookup", 4), ("ernie45/tiny-moe", None, 6)],
)
def test_all_is_compiled_while_loading_whatever_runs_then(
    name: str, draft: Draft, num_versions: int, request: pytest.FixtureRequest
) -> None:
    with load(name) as model:
        expected = replies(model)
        expected_logits = model.logits(PROMPTS[1])
    request.getfixturevalue("on_cpu")
    before = num_compiled()
    with load(name, draft=draft) as model:
        assert num_compiled() == before + num_versions  # one token, any number of them; two or three parts of layers
        assert list(model.stats.load_stages) == ["find", "check", "tokenizer", "weights", "compile", "engine"]
        assert model.stats.load_stages["compile"] > 0
        assert replies(model) == expected
        assert torch.equal(model.logits(PROMPTS[1]), expected_logits)
        assert num_compiled() == before + num_versions
    load(name).close()
    assert num_compiled() == before + num_versions  # shared by models of one shape


@pytest.mark.parametrize(
    "case",
    [
        CASES["there and back"],
        CASES["experts of one layer elsewhere"],
        replace(CASES["pictures"], placement=Placement.on("cpu", 3)),
    ],
    ids=["stages", "experts elsewhere", "pictures"],
)
@torch.inference_mode()  # as on the engine's thread
@pytest.mark.usefixtures("without_library")
def test_the_same_bits_wherever_parts_lie_and_with_pictures(
    case: Case, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = logits(case)
    request.getfixturevalue("on_cpu")
    counts = [num_compiled()]

    def build_and_compile(case: Case, dtype: torch.dtype) -> TextBackend | VisionLanguageBackend:
        backend = build(case, dtype)
        compile_layers(backend, case.placement, StageClock(), show=False)
        counts.append(num_compiled())
        return backend

    monkeypatch.setattr(test_placement, "build", build_and_compile)
    for one, other in zip(logits(case), expected, strict=True):
        assert torch.equal(one, other)
    assert counts[0] < counts[1] == num_compiled()


def compiles(shape: ModelSpec, preset: QuantPreset, dtype: torch.dtype = torch.float32) -> bool:
    options = BuildOptions.unquantised(shape, dtype=dtype, device="cpu", context_tokens=64)
    stages = WeightBuilder(shape, Stored(), replace(options, preset=preset)).decoder().stages
    return all(isinstance(stage, CompiledStage) for stage in stages)


@pytest.mark.usefixtures("without_library", "on_cpu")
def test_layers_with_quantised_matrices_stay_as_they_are_but_for_routed_experts() -> None:
    assert all(compiles(shape, PRESETS["none"]) for shape in (DENSE, MOE, VL))
    assert compiles(MOE, QuantPreset(name="experts only", experts="int4"))
    assert not any(compiles(MOE, PRESETS[name]) for name in ("int8", "int4", "nf4", "bnb-int8"))


@pytest.mark.usefixtures("native", "on_cpu")
def test_native_kernels_go_first() -> None:
    assert not compiles(DENSE, PRESETS["none"], torch.bfloat16)


def test_on_a_cpu_nothing_is_compiled() -> None:
    assert not compiles(DENSE, PRESETS["none"])
    before = num_compiled()
    with load() as model:
        model.generate(PROMPTS[0], **GREEDY)
        assert "compile" not in model.stats.load_stages
    assert num_compiled() == before


def test_on_a_cpu_the_compiler_is_not_imported() -> None:
    code = (
        "import sys; from ernie45 import ErnieModel; "
        "ErnieModel.from_pretrained('ernie45/tiny-dense', device='cpu', progress=False).close(); "
        "assert 'torch._inductor.compile_fx' not in sys.modules; "
        "assert 'torch._dynamo.convert_frame' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def broken(*arguments: object, **options: object) -> NoReturn:
    raise RuntimeError("no compiler on this machine\nwith details")


def test_where_compiling_fails_a_warning_says_why_and_replies_are_the_same(request: pytest.FixtureRequest) -> None:
    with load() as model:
        expected = replies(model)
    request.getfixturevalue("on_cpu")
    torch.compiler.set_default_backend(broken)
    with pytest.warns(RuntimeWarning, match="on cpu run without it.*no compiler on this machine") as warned:
        model = load()
    assert "compile=False" in str(warned[0].message)
    with model:
        assert replies(model) == expected
    assert len(warned) == 1


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("fault", [torch.OutOfMemoryError, ValueError])
def test_a_step_that_fails_ends_its_request_and_not_compiling(
    fault: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    attend = Attention.attend

    def fail(self: Attention, query: torch.Tensor, *others: Any) -> torch.Tensor:
        if len(query) > 100:
            raise fault("too many tokens")
        return attend(self, query, *others)

    def not_compiled(self: Stage, x: torch.Tensor, batch: Batch) -> NoReturn:
        pytest.fail("compiling was given up")

    with load() as model, warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = replies(model)
        monkeypatch.setattr(Attention, "attend", fail)
        with pytest.raises(fault, match="too many tokens"):
            model.generate([5] * 200, **GREEDY)
        monkeypatch.setattr(Stage, "__call__", not_compiled)
        assert replies(model) == expected


@pytest.mark.usefixtures("on_cpu")
def test_it_can_be_left_out() -> None:
    before = num_compiled()
    with torch._dynamo.config.patch(disable=True):  # what TORCH_COMPILE_DISABLE=1 sets
        models = [load(), load(compile=False)]
    for model in models:
        with model:
            model.generate(PROMPTS[0], **GREEDY)
            assert "compile" not in model.stats.load_stages
    assert num_compiled() == before


@pytest.mark.usefixtures("on_cpu")
def test_a_bar_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    load(show=True).close()
    bars = [line.strip() for line in terminal.getvalue().replace("\n", "\r").split("\r")]
    assert [line for line in bars if line.startswith("Compiling layers: 100%")]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.slow
@pytest.mark.usefixtures("on_cpu")
def test_compiled_by_inductor_the_replies_are_the_same() -> None:
    torch.compiler.set_default_backend(None)
    _check_replies("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine")
def test_on_a_gpu_the_replies_are_the_same() -> None:
    _check_replies("cuda")


def _check_replies(device: str) -> None:
    with load("ernie45/tiny-moe", device=device) as model:
        before = num_compiled()
        assert "compile" in model.stats.load_stages
        got, got_logits = replies(model), model.logits(PROMPTS[1])
        assert num_compiled() == before
    with load("ernie45/tiny-moe", device=device, compile=False) as model:
        assert got == replies(model)
        torch.testing.assert_close(got_logits, model.logits(PROMPTS[1]), atol=1e-4, rtol=0)
