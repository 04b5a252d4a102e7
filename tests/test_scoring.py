from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from ernie45 import ErnieModel, InvalidRequestError, OutOfMemoryError, Prompt, scoring
from ernie45.runners.scripted import ScriptedRunner

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
