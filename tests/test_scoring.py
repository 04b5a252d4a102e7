from __future__ import annotations

import dataclasses
import math
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from ernie45 import ErnieModel, InvalidRequestError, OutOfMemoryError, Prompt, scoring
from ernie45.kernels.library import native_library
from ernie45.memory.workspace import PREFILL_CHUNK_TOKENS, SCORED_ROWS
from ernie45.runners.base import Handle, wait_until_ready
from ernie45.runners.scripted import ScriptedRunner
from ernie45.types.requests import TokenRequest

IDS = [5, 30, 99, 7, 8, 200]


def test_a_score_is_the_log_softmax_of_the_raw_logits(small_model: ErnieModel) -> None:
    score = small_model.score(IDS)
    raw = small_model.logits(IDS).double().log_softmax(-1)
    expected = [float(raw[n, token_id]) for n, token_id in enumerate(IDS[1:])]
    assert list(score.token_ids) == IDS
    assert list(score.logprobs) == pytest.approx(expected, abs=1e-5)
    assert score.perplexity == pytest.approx(math.exp(-sum(expected) / len(expected)), rel=1e-5)


def test_a_text_is_scored_as_its_tokens(small_model: ErnieModel) -> None:
    text = "the cat sat on the hat"
    score = small_model.score(text)
    assert list(score.token_ids) == small_model.tokenizer.encode(text)
    assert len(score.logprobs) == len(score.token_ids) - 1
    assert score == small_model.score(Prompt(text=text, token_ids=tuple(score.token_ids)))


def test_what_greedy_writes_is_the_likeliest(small_model: ErnieModel) -> None:
    reply = small_model.generate(IDS, temperature=0, max_new_tokens=1)
    best = small_model.score([*IDS, *reply.token_ids]).logprobs[-1]
    assert all(small_model.score([*IDS, other]).logprobs[-1] <= best for other in range(0, 320, 16))


@pytest.fixture(scope="module")
def long_model(make_checkpoint: object, tmp_path_factory: pytest.TempPathFactory) -> ErnieModel:
    assert callable(make_checkpoint)
    folder: Path = make_checkpoint(
        tmp_path_factory.mktemp("long"), max_position_embeddings=2048, num_hidden_layers=1, tokenizer=False
    )
    return ErnieModel.from_pretrained(folder, device="cpu", progress=False)


def test_a_prompt_of_many_chunks_is_scored_whole(long_model: ErnieModel) -> None:
    ids = [(7 * n) % 300 for n in range(1300)]  # chunks of 512 tokens
    logits = long_model.logits(ids)
    assert logits.shape == (1300, 384)
    positions = [1299, 0, 511, 512, 1023, 1024, 512]
    torch.testing.assert_close(long_model.logits(ids, positions=positions), logits[positions], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(long_model.logits(ids, positions=[3]), logits[[3]], atol=1e-5, rtol=1e-5)
    score = long_model.score(ids)
    raw = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(score.logprobs), raw, atol=1e-4, rtol=0)


@pytest.mark.parametrize("preset", ["none", "int8"])
def test_logits_of_few_rows_are_in_memory_at_a_time(preset: str) -> None:
    ids = tuple((7 * n) % 300 for n in range(PREFILL_CHUNK_TOKENS + 40))
    alive: list[weakref.ref[torch.Tensor]] = []
    kept: list[torch.Tensor] = []

    def look(logits: torch.Tensor) -> None:
        assert all(earlier() is None for earlier in alive)
        alive.append(weakref.ref(logits))
        kept.append(logits.clone())

    options: dict[str, Any] = {"quantization": preset, "dtype": "bfloat16", "context_tokens": 600}
    with ErnieModel.from_pretrained("ernie45/tiny-dense", device="cpu", progress=False, **options) as model:
        runner = model._loaded.runner
        asked = TokenRequest(token_ids=ids, logit_positions=tuple(range(len(ids))), on_logits=look)
        handle = runner.submit(asked)
        wait_until_ready(handle)
        handle.poll()
        assert max(map(len, kept)) == SCORED_ROWS
        assert torch.equal(model.logits(ids), torch.cat(kept))
        if native_library() is not None:  # where rows do not depend on those beside them
            whole = torch.cat(kept)
            assert all(torch.equal(model.logits(ids, positions=[place])[0], whole[place]) for place in (0, 15, 530))


def test_a_cancelled_request_computes_no_more_logits(long_model: ErnieModel) -> None:
    calls: list[int] = []

    def cancel(logits: torch.Tensor) -> None:
        calls.append(len(logits))
        submitted.wait()
        handle.cancel()

    submitted = threading.Event()
    ids = tuple((7 * n) % 300 for n in range(PREFILL_CHUNK_TOKENS))
    asked = TokenRequest(token_ids=ids, logit_positions=tuple(range(len(ids))), on_logits=cancel)
    handle = long_model._loaded.runner.submit(asked)
    submitted.set()
    wait_until_ready(handle)
    event = handle.poll()
    assert event is not None
    assert event.finish_reason == "cancelled"
    assert calls == [SCORED_ROWS]
    assert long_model.score([5, 6]).token_ids == (5, 6), "the engine goes on"


def test_a_runner_that_gives_too_few_logits_is_found_out() -> None:
    class Silent:
        def submit(self, request: TokenRequest) -> Handle:
            return ScriptedRunner([[]]).submit(dataclasses.replace(request, logit_positions=None))

        def close(self) -> None: ...

    prompt = Prompt(text="", token_ids=(1, 2, 3))
    with pytest.raises(RuntimeError, match=r"Silent.*of 3 positions, it gave on_logits the logits of 0"):
        scoring.prompt_logits(Silent(), prompt, None, 10)


def test_a_score_is_what_its_logits_say() -> None:
    ids = [(7 * n) % 300 for n in range(200)]
    with ErnieModel.from_pretrained("ernie45/tiny-dense", device="cpu", progress=False) as model:
        logits = model.logits(ids)[:-1].double()
        chosen = logits.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        assert model.score(ids).logprobs == pytest.approx((chosen - logits.logsumexp(1)).tolist(), rel=1e-6, abs=3e-6)


def test_logits_that_would_not_fit_are_refused_before_the_model_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "free_bytes", lambda device: 4 * 1000 * 2 - 1)
    runner = ScriptedRunner([])
    prompt = Prompt(text="", token_ids=(1, 2, 3))
    with pytest.raises(OutOfMemoryError, match="3 rows of 1000 logits") as caught:
        scoring.prompt_logits(runner, prompt, None, 1000)
    assert "positions=" in caught.value.hint
    with pytest.raises(OutOfMemoryError, match="2 rows"):
        scoring.prompt_logits(runner, prompt, [0, -1], 1000)
    assert runner.requests == []


def test_no_positions_give_no_rows_without_running() -> None:
    runner = ScriptedRunner([])
    assert scoring.prompt_logits(runner, Prompt(text="", token_ids=(1, 2)), [], 10).shape == (0, 10)
    assert runner.requests == []


@pytest.mark.parametrize("positions", [[2], [-3], [0.0], [True], "0", 1])
def test_positions_outside_the_prompt(positions: object) -> None:
    with pytest.raises(InvalidRequestError, match="position") as caught:
        scoring.prompt_logits(ScriptedRunner([]), Prompt(text="", token_ids=(1, 2)), positions, 10)  # type: ignore[arg-type]
    assert caught.value.hint


def test_a_single_token_has_no_score(small_model: ErnieModel) -> None:
    with pytest.raises(InvalidRequestError, match="at least two tokens, not 1"):
        small_model.score([5])
