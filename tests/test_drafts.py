"""`draft=`: each way of guessing on the tiny models, what it is refused for, and what it takes."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ernie45 import ErnieModel, catalogue, loading, plan_memory
from ernie45.checkpoint.resolve import resolve
from ernie45.engine.speculation.control import StepCost, StepTimes
from ernie45.engine.speculation.lookup import PromptLookup
from ernie45.engine.speculation.proposer import Ask
from ernie45.errors import (
    ConfigError,
    CorruptFileError,
    ErnieError,
    InvalidRequestError,
    ModelNotFoundError,
    OutOfMemoryError,
    UnsupportedError,
)
from ernie45.memory.draft import Draft, is_model
from ernie45.testing.tasks import task_names, tasks
from tests.engine.test_engine import eventually
from tests.paddle_files import CONFIG, EXPERTS, random_pt, write_checkpoint

DENSE, MOE = "ernie45/tiny-dense", "ernie45/tiny-moe"
DRAFTS: list[tuple[str, Draft]] = [
    (DENSE, "lookup"),
    (DENSE, DENSE),
    (MOE, "lookup"),
    (MOE, "mtp"),
    (MOE, MOE),
]
OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.2, "logprobs": 2},
    {"temperature": 1.0, "seed": 5},
]
Load = Callable[..., ErnieModel]


@pytest.fixture(scope="module")
def load() -> Iterator[Load]:
    loaded: dict[tuple[str, Draft], ErnieModel] = {}

    def load(name: str, draft: Draft = None) -> ErnieModel:
        if (name, draft) not in loaded:
            loaded[name, draft] = ErnieModel.from_pretrained(name, device="cpu", draft=draft, max_batch=4)
        return loaded[name, draft]

    yield load
    for model in loaded.values():
        model.close()


@pytest.fixture(autouse=True)
def cheap_guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether guessing for a tiny model pays on this machine is not the question."""
    monkeypatch.setattr(StepTimes, "cost", lambda self, num_rows: StepCost(fixed=1.0, token=0.05, guess=0.05))


def questions(name: str, num_items: int = 1) -> list[Any]:
    return [item.messages for task in task_names(name) for item in tasks(task, num_items, seed=9, split="test")]


def built_in(name: str) -> Path:
    entry = catalogue.find(name)
    assert entry is not None
    return catalogue.built_in_folder(entry)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("name", "draft"), DRAFTS)
def test_replies_are_those_without_a_draft(load: Load, name: str, draft: Draft, options: dict[str, Any]) -> None:
    conversations = questions(name)
    plain = load(name).batch_chat(conversations, max_new_tokens=80, **options)
    drafted = load(name, draft).batch_chat(conversations, max_new_tokens=80, **options)
    assert [reply.token_ids for reply in drafted] == [reply.token_ids for reply in plain]
    assert [reply.finish_reason for reply in drafted] == [reply.finish_reason for reply in plain]
    for reply, expected in zip(drafted, plain, strict=True):
        ranks = [[token_id for token_id, _ in token.top] for token in reply.logprobs or ()]
        assert len(ranks) == len(expected.logprobs or ())
    assert sum(reply.usage.accepted_draft_tokens for reply in drafted) > 0


def test_a_stream_with_a_draft_is_the_reply(load: Load) -> None:
    messages = questions(DENSE)[6]
    chunks = list(load(DENSE, "lookup").stream_chat(messages, temperature=0))
    whole = load(DENSE).chat(messages, temperature=0)
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert all(len(chunk.token_ids) <= 1 for chunk in chunks), "a chunk for every token"


def test_the_head_of_tiny_moe_is_right_most_of_the_time(load: Load) -> None:
    model = load(MOE, "mtp")
    replies = [model.chat(messages, temperature=0, max_new_tokens=100) for messages in questions(MOE, 2)]
    guessed = sum(reply.usage.draft_tokens for reply in replies)
    assert guessed > 50
    assert sum(reply.usage.accepted_draft_tokens for reply in replies) >= 0.6 * guessed


def test_copying_is_guessed_from_the_prompt(load: Load) -> None:
    model = load(DENSE, "lookup")
    usages = [model.chat(item.messages, temperature=0).usage for item in tasks("copy_replace", 6, seed=3, split="test")]
    accepted = sum(usage.accepted_draft_tokens for usage in usages)
    assert accepted > 0.5 * sum(usage.completion_tokens for usage in usages)
    assert accepted > 0.4 * sum(usage.draft_tokens for usage in usages)


def test_bad_guesses_change_nothing_and_fade(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    def guess(self: PromptLookup, asks: Sequence[Ask]) -> list[list[int]]:
        return [[random.Random(len(ask.token_ids)).randrange(500) for _ in range(ask.most)] for ask in asks]

    prompt = "What is"
    plain = load(DENSE).generate(prompt, temperature=0, max_new_tokens=400, ignore_eos=True)
    monkeypatch.setattr(PromptLookup, "propose", guess)
    guessed = load(DENSE, "lookup").generate(prompt, temperature=0, max_new_tokens=400, ignore_eos=True)
    assert guessed.token_ids == plain.token_ids
    assert 0 < guessed.usage.draft_tokens < 100


def test_a_seed_gives_the_same_reply_every_time(load: Load) -> None:
    model = load(MOE, "mtp")
    messages = questions(MOE)[0]
    replies = {model.chat(messages, temperature=1.5, top_p=1, seed=8, max_new_tokens=60).token_ids for _ in range(4)}
    assert len(replies) == 1


def test_what_a_draft_takes_is_planned(load: Load) -> None:
    plain, lookup, head, twin = (load(MOE, draft).plan for draft in (None, "lookup", "mtp", MOE))
    assert plain.parts["draft"] == lookup.parts["draft"] == 0
    assert (lookup.weight_bytes, lookup.kv_bytes) == (plain.weight_bytes, plain.kv_bytes)
    assert head.weight_bytes == plain.weight_bytes + head.parts["draft"]
    assert head.parts["draft"] > 1_000_000
    assert head.kv_bytes == plain.kv_bytes * 5 // 4, "one layer beside four"
    assert twin.kv_bytes == 2 * plain.kv_bytes
    assert twin.weight_bytes == plain.weight_bytes + twin.parts["draft"]
    assert plain.weight_bytes / 3 < twin.parts["draft"] < plain.weight_bytes, "int8, since only its speed counts"


def test_the_report_accounts_for_the_head(load: Load) -> None:
    def ignored(draft: Draft) -> list[str]:
        return [tensor.name for tensor in load(MOE, draft).load_report.ignored if ".mtp_" in tensor.name]

    assert len(ignored(None)) == 12
    assert ignored("mtp") == []
    assert load(MOE, "mtp").load_report.weight_parts["draft"] == load(MOE, "mtp").plan.parts["draft"]


def test_statistics_count_what_was_guessed(load: Load) -> None:
    assert load(DENSE).stats.draft_tokens == 0
    model = load(MOE, "mtp")
    before = model.stats
    usage = model.chat(questions(MOE)[0], temperature=0).usage
    assert usage.draft_tokens > 0
    # A step is counted when all of it is done, a moment after the reader has its last token.
    assert eventually(lambda: model.stats.draft_tokens - before.draft_tokens == usage.draft_tokens)
    assert model.stats.accepted_draft_tokens - before.accepted_draft_tokens == usage.accepted_draft_tokens
    assert "of them rightly" in str(model.stats)


@pytest.mark.parametrize("layout", ["pt", "paddle", "paddleformers"])
def test_the_head_is_read_in_every_layout(tmp_path: Path, layout: Any) -> None:
    config = {**CONFIG, **EXPERTS, "num_nextn_predict_layers": 1}
    folder = write_checkpoint(tmp_path / "model", random_pt(config, mtp=True), config, layout=layout)
    ids = list(range(5, 25))
    with ErnieModel.from_pretrained(folder, device="cpu", quantization="none") as plain:
        expected = plain.generate(ids, temperature=0, max_new_tokens=30, ignore_eos=True)
    with ErnieModel.from_pretrained(folder, device="cpu", quantization="none", draft="mtp") as model:
        reply = model.generate(ids, temperature=0, max_new_tokens=30, ignore_eos=True)
    assert reply.token_ids == expected.token_ids
    assert reply.usage.draft_tokens > 0


@pytest.mark.parametrize("draft", ["", "  ", 3, True, ["lookup"], np.array([1, 2])])
def test_what_names_no_draft_is_refused(draft: Any) -> None:
    with pytest.raises(InvalidRequestError, match="draft=") as caught:
        ErnieModel.from_pretrained(DENSE, draft=draft)
    assert "lookup" in caught.value.hint


def test_a_draft_that_is_not_there_is_named() -> None:
    for draft in ("./nowhere", "lokup", Path("nowhere")):
        with pytest.raises(ModelNotFoundError, match=r"draft='.*(nowhere|lokup)': there is no folder") as caught:
            ErnieModel.from_pretrained(DENSE, draft=draft)
        assert 'draft="lookup"' in caught.value.hint
    with pytest.raises(ModelNotFoundError, match=r"draft='\./nowhere'"):  # before anything is fetched
        ErnieModel.from_pretrained("no-such/model", draft="./nowhere")


def test_whatever_fails_with_a_draft_is_said_to_be_about_it(tmp_path: Path, small_folder_path: Path) -> None:
    broken = Path(shutil.copytree(small_folder_path, tmp_path / "broken"))
    (broken / "model.safetensors").write_bytes(b"12345678")
    with pytest.raises(CorruptFileError, match=r"draft='.*broken': "):
        ErnieModel.from_pretrained(small_folder_path, device="cpu", draft=broken)
    (broken / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"draft='.*broken': .* has no config.json"):
        ErnieModel.from_pretrained(small_folder_path, device="cpu", draft=broken)


def test_faults_of_the_model_are_not_said_to_be_about_the_draft(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json") as caught:
        ErnieModel.from_pretrained(tmp_path, device="cpu", draft=DENSE)
    assert "draft=" not in caught.value.message
    broken = Path(shutil.copytree(built_in(DENSE), tmp_path / "broken"))
    (broken / "tokenizer.model").write_bytes(b"no pieces")
    with pytest.raises(ErnieError, match=r"tokenizer\.model") as damaged:
        ErnieModel.from_pretrained(broken, device="cpu", draft=DENSE)
    assert "draft=" not in damaged.value.message


def test_a_draft_is_not_fetched_for_a_folder_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(name: str, **options: Any) -> Path:
        if name == "hub/small":
            pytest.fail("the draft would be fetched now")
        return resolve(name, **options)

    monkeypatch.setattr(loading, "resolve", fetch)
    with pytest.raises(OutOfMemoryError):
        ErnieModel.from_pretrained(MOE, device="cpu", draft="hub/small", memory="1MiB")
    with pytest.raises(ErnieError, match="context_tokens"):
        ErnieModel.from_pretrained(MOE, device="cpu", draft="hub/small", context_tokens=10**7)


def test_a_draft_is_compared_before_weights_are_fetched(
    tmp_path: Path, small_folder_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub is stood in for by a resolve that has the small files of both, and the weights of none."""
    names = {"hub/model": small_folder_path, "hub/vl": built_in("ernie45/tiny-vl"), "hub/moe": built_in(MOE)}
    asked = []

    def fetch(name: str, *, check: Callable[[Path], object], **options: Any) -> Path:
        asked.append(name)
        check(names[name])
        pytest.fail(f"the weights of {name} would be fetched now")

    monkeypatch.setattr(loading, "resolve", fetch)
    for draft, message in (("hub/vl", "vision-language"), ("hub/moe", "vocabulary of 2048 ids, .* for one of 384")):
        with pytest.raises(InvalidRequestError, match=f"draft='{draft}'.*{message}"):
            ErnieModel.from_pretrained("hub/model", device="cpu", draft=draft)
    assert asked == ["hub/model", "hub/vl", "hub/model", "hub/moe"]
    listed = tmp_path / "listed"
    shutil.copytree(small_folder_path, listed)
    (listed / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": "a.safetensors"}})
    )
    names["hub/listed"] = listed
    with pytest.raises(UnsupportedError, match="draft='mtp' was asked for"):
        ErnieModel.from_pretrained("hub/listed", device="cpu", draft="mtp")


def test_without_room_for_the_draft_dropping_it_is_the_first_remedy() -> None:
    options: dict[str, Any] = {"device": "cpu", "quantization": "int4", "max_batch": 1, "context_tokens": 1024}
    alone = plan_memory(MOE, **options).peak_bytes
    with pytest.raises(OutOfMemoryError, match=r"weights of draft= \d") as caught:
        ErnieModel.from_pretrained(MOE, draft=MOE, memory=str(alone + 2**20), **options)
    assert caught.value.hint.startswith("It fits without draft=.")


@pytest.mark.parametrize(("name", "draft"), DRAFTS)
@pytest.mark.parametrize("preset", ["auto", "int4"])
def test_the_plan_by_name_is_that_of_the_loaded_model(name: str, draft: Draft, preset: str) -> None:
    options: dict[str, Any] = {"device": "cpu", "quantization": preset, "draft": draft, "max_batch": 3}
    planned = plan_memory(name, memory="1GiB", context_tokens=700, **options)
    with ErnieModel.from_pretrained(name, memory="1GiB", context_tokens=700, progress=False, **options) as model:
        assert dict(model.plan.parts) == dict(planned.parts)
        assert (model.plan.loading_bytes, model.plan.peak_bytes) == (planned.loading_bytes, planned.peak_bytes)
    if is_model(draft):
        alone = plan_memory(name, memory="1GiB", context_tokens=700, **{**options, "draft": None})
        assert planned.workspace_bytes > alone.workspace_bytes, "what a draft works with is counted beside the model's"


def test_a_checkpoint_without_a_head_says_so() -> None:
    with pytest.raises(UnsupportedError, match=r"draft='mtp'.*mtp_linear_proj") as caught:
        ErnieModel.from_pretrained(DENSE, device="cpu", draft="mtp")
    assert "lookup" in caught.value.hint
    assert "saved again" in caught.value.hint
    with pytest.raises(UnsupportedError, match="is not a text model"):
        ErnieModel.from_pretrained("ernie45/tiny-vl", device="cpu", draft="mtp")


def refusal(name: str | Path, draft: str | Path) -> ErnieError:
    with pytest.raises(InvalidRequestError) as caught:
        ErnieModel.from_pretrained(name, device="cpu", draft=draft)
    return caught.value


def test_a_draft_with_other_tokens_is_refused(
    tmp_path: Path, small_folder_path: Path, make_checkpoint: Callable[..., Path]
) -> None:
    sizes = refusal(DENSE, make_checkpoint(tmp_path / "wide", vocab_size=2048))
    assert "tokenizer of 3" in sizes.message
    assert "same family" in sizes.hint
    swapped = Path(shutil.copytree(small_folder_path, tmp_path / "swapped"))
    config = json.loads((swapped / "tokenizer_config.json").read_text())
    config["cls_token"] = "<|other|>"
    (swapped / "tokenizer_config.json").write_text(json.dumps(config))
    assert "id " in refusal(small_folder_path, swapped).message
    plain = make_checkpoint(tmp_path / "plain", tokenizer=False)
    assert (
        "vocabulary of" in refusal(plain, make_checkpoint(tmp_path / "other", tokenizer=False, vocab_size=80)).message
    )
    assert "vision-language" in refusal(DENSE, "ernie45/tiny-vl").message
