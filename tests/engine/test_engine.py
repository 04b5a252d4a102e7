"""The engine with a backend that counts: what is computed when, and for whom."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping

import pytest
import torch

from ernie45.backends.base import Batch, Step
from ernie45.backends.kv_cache import DenseStore, Int8Store
from ernie45.engine.engine import Engine
from ernie45.errors import CorruptFileError, ModelClosedError, UnsupportedError
from ernie45.memory.budget import KVDtype
from ernie45.memory.workspace import PREFILL_CHUNK_TOKENS
from ernie45.presets import WeightPart
from ernie45.runners.base import Handle
from ernie45.spec import ModelSpec, parse_spec
from ernie45.types.placement import Placement
from ernie45.types.requests import Sampling, ThinkingLimit, TokenRequest
from ernie45.types.results import TokenEvent
from tests.backends.test_placement import DeviceWatch

VOCAB_SIZE = 50
NUM_TOKEN_IDS = 40
# Ids that only a prompt can hold, since they are never drawn.
POISON_ID = 45
NAN_ID = 47
STOP_ID = 7


class CountingBackend:
    """Says of every token that its successor comes next, and keeps each step's rows. POISON_ID makes a step fail."""

    def __init__(self) -> None:
        self.spec: ModelSpec = parse_spec(
            {
                "model_type": "ernie4_5",
                "hidden_size": 4,
                "intermediate_size": 4,
                "num_hidden_layers": 1,
                "num_attention_heads": 1,
                "head_dim": 2,
                "rms_norm_eps": 1e-5,
                "rope_theta": 10000.0,
                "vocab_size": VOCAB_SIZE,
            }
        )
        self.dtype = torch.float32
        self.device = torch.device("cpu")
        self.weight_bytes: Mapping[WeightPart, int] = {}
        self.steps: list[Batch] = []
        self.may_run = threading.Event()
        self.may_run.set()

    def forward(self, batch: Batch) -> Step:
        assert self.may_run.wait(10)
        self.steps.append(batch)
        if POISON_ID in batch.token_ids.tolist():
            raise ArithmeticError("poisoned")
        following = (batch.token_ids[batch.wanted] + 1) % VOCAB_SIZE
        logits = torch.nn.functional.one_hot(following, VOCAB_SIZE).float()
        logits[batch.token_ids[batch.wanted] == NAN_ID] = torch.nan
        return Step(logits=logits)


@pytest.fixture
def backend() -> CountingBackend:
    return CountingBackend()


@pytest.fixture
def engine(backend: CountingBackend) -> Iterator[Engine]:
    engine = Engine(backend, num_slots=2, context_tokens=2048, num_token_ids=NUM_TOKEN_IDS)
    yield engine
    backend.may_run.set()
    engine.close()


def request(*token_ids: int, max_new_tokens: int = 3, **sampling: object) -> TokenRequest:
    return TokenRequest(
        token_ids=token_ids,
        sampling=Sampling(**{"temperature": 0.0, **sampling}),  # type: ignore[arg-type]
        max_new_tokens=max_new_tokens,
        stop_token_ids=frozenset([STOP_ID]),
    )


def next_event(stream: Handle) -> TokenEvent:
    ready = threading.Event()
    stream.notify(ready.set)
    assert ready.wait(10), "the engine gave nothing"
    event = stream.poll()
    assert event is not None
    return event


def drain(stream: Handle) -> tuple[list[int], str]:
    token_ids = []
    while True:
        event = next_event(stream)
        if event.token_id is not None:
            token_ids.append(event.token_id)
        if event.finish_reason is not None:
            return token_ids, event.finish_reason


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


def test_a_reply_ends_at_its_length_or_at_a_stop_token(engine: Engine) -> None:
    assert drain(engine.submit(request(20))) == ([21, 22, 23], "length")
    assert drain(engine.submit(request(5, max_new_tokens=9))) == ([6, STOP_ID], "stop")


def test_ids_from_the_tokenizers_size_on_are_never_drawn(engine: Engine) -> None:
    # The backend asks for 40, 41, …; with every real id at the same logit the lowest is taken.
    assert drain(engine.submit(request(NUM_TOKEN_IDS - 1))) == ([0, 1, 2], "length")


def test_prompts_are_run_in_chunks_at_fixed_edges_and_alone(engine: Engine, backend: CountingBackend) -> None:
    prompt = [1] * (2 * PREFILL_CHUNK_TOKENS + 5)
    drain(engine.submit(request(*prompt, max_new_tokens=1)))
    rows = [[(row.start, row.num_tokens) for row in batch.rows] for batch in backend.steps]
    assert rows == [[(0, 512)], [(512, 512)], [(1024, 5)]]
    assert [batch.wanted.tolist() for batch in backend.steps] == [[], [], [4]]


def test_rows_join_and_leave_between_steps(engine: Engine, backend: CountingBackend) -> None:
    backend.may_run.clear()
    long, short = engine.submit(request(20, max_new_tokens=6)), engine.submit(request(30, max_new_tokens=3))
    waiting = engine.submit(request(25, max_new_tokens=2))
    backend.may_run.set()
    assert drain(long)[0] == [21, 22, 23, 24, 25, 26]
    assert drain(short)[0] == [31, 32, 33]
    assert drain(waiting)[0] == [26, 27]
    widths = [len(batch.rows) for batch in backend.steps]
    assert max(widths) == 2
    last = next(step for step, batch in enumerate(backend.steps) if 25 in batch.token_ids.tolist())
    assert last < len(backend.steps) - 1, "the waiting request did not start before the long one ended"


def test_a_long_prompt_does_not_hold_up_running_rows(engine: Engine, backend: CountingBackend) -> None:
    backend.may_run.clear()
    running = engine.submit(request(20, max_new_tokens=15))
    engine.submit(request(*[1] * (3 * PREFILL_CHUNK_TOKENS)))
    backend.may_run.set()
    drain(running)
    kinds = ["prefill" if batch.rows[0].num_tokens > 1 else "decode" for batch in backend.steps]
    first = kinds.index("prefill")
    assert kinds[first : first + 6] == ["prefill", "decode"] * 3


def test_readers_who_do_not_read_keep_nobody_from_a_slot(engine: Engine) -> None:
    unread = [engine.submit(request(1, max_new_tokens=200, logit_bias={3: 100.0})) for _ in range(2)]
    assert drain(engine.submit(request(20)))[1] == "length"
    assert [len(drain(stream)[0]) for stream in unread] == [200, 200], "and they lose nothing"


def test_a_scoring_row_does_not_wait_for_its_reader(engine: Engine, backend: CountingBackend) -> None:
    prompt = tuple([1] * (4 * PREFILL_CHUNK_TOKENS))
    unread = [engine.submit(TokenRequest(token_ids=prompt, logit_positions=(0, 600, 1200, 2000))) for _ in range(3)]
    assert drain(engine.submit(request(20)))[1] == "length"
    assert [drain(stream) for stream in unread] == [([], "stop")] * 3


def test_logits_that_are_not_numbers_end_their_own_row_only(engine: Engine) -> None:
    healthy, broken = engine.submit(request(20, max_new_tokens=8)), engine.submit(request(NAN_ID))
    with pytest.raises(CorruptFileError, match="nan"):
        drain(broken)
    assert len(drain(healthy)[0]) == 8


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork() on this system")
@pytest.mark.parametrize("call", ["submit", "read"])
def test_a_forked_child_is_told_so_instead_of_waiting_forever(
    engine: Engine, backend: CountingBackend, call: str
) -> None:
    backend.may_run.clear()
    begun = engine.submit(request(1))
    child = os.fork()
    if child == 0:
        try:
            engine.close()  # returns, although nobody could join the thread
            signal.alarm(10)
            engine.submit(request(1)) if call == "submit" else drain(begun)
        except UnsupportedError as error:
            os._exit(0 if "fork" in error.message else 2)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    backend.may_run.set()
    assert drain(begun)[0] == [2, 3, 4], "the parent goes on"


def test_cancelling_frees_the_slots_of_running_and_waiting_requests(engine: Engine) -> None:
    endless = [engine.submit(request(1, max_new_tokens=2000, logit_bias={3: 100.0})) for _ in range(3)]
    next_event(endless[0])
    assert eventually(lambda: engine.num_free_slots == 0)
    for stream in endless:
        stream.cancel()
    assert eventually(lambda: engine.num_free_slots == 2)
    assert [drain(stream)[1] for stream in endless] == ["cancelled"] * 3


def test_cancelling_takes_effect_within_a_step(engine: Engine, backend: CountingBackend) -> None:
    stream = engine.submit(request(1, max_new_tokens=2000, logit_bias={3: 100.0}))
    next_event(stream)
    backend.may_run.clear()
    time.sleep(0.05)  # the engine is inside a step, or about to enter one
    steps_before = len(backend.steps)
    stream.cancel()
    backend.may_run.set()
    assert eventually(lambda: engine.num_free_slots == 2)
    assert len(backend.steps) <= steps_before + 2


def test_what_fails_for_one_request_reaches_its_reader_and_nobody_else(engine: Engine) -> None:
    healthy = engine.submit(request(20, max_new_tokens=8))
    poisoned = engine.submit(request(POISON_ID))
    with pytest.raises(ArithmeticError, match="poisoned"):
        drain(poisoned)
    assert drain(healthy) == ([21, 22, 23, 24, 25, 26, 27, 28], "length")
    assert eventually(lambda: engine.num_free_slots == 2)


def test_scoring_gives_the_wanted_logits_chunk_by_chunk(engine: Engine) -> None:
    prompt = tuple(i % 12 for i in range(PREFILL_CHUNK_TOKENS + 3))
    positions = (0, 2, PREFILL_CHUNK_TOKENS, PREFILL_CHUNK_TOKENS + 2)
    given: list[torch.Tensor] = []
    stream = engine.submit(TokenRequest(token_ids=prompt, logit_positions=positions, on_logits=given.append))
    assert drain(stream) == ([], "stop")
    first, second = given
    assert first.argmax(-1).tolist() == [prompt[0] + 1, prompt[2] + 1]
    assert second.argmax(-1).tolist() == [prompt[512] + 1, prompt[514] + 1]
    assert second.shape == (2, VOCAB_SIZE), "nothing is masked"


def test_what_fails_with_the_logits_reaches_the_reader(engine: Engine) -> None:
    def fail(logits: torch.Tensor) -> None:
        raise ZeroDivisionError("in the reader's code")

    stream = engine.submit(TokenRequest(token_ids=(1, 2), logit_positions=(1,), on_logits=fail))
    with pytest.raises(ZeroDivisionError, match="in the reader's code"):
        drain(stream)
    assert drain(engine.submit(request(20)))[1] == "length"


def test_close_ends_every_request_and_stops_the_thread(backend: CountingBackend) -> None:
    others = set(threading.enumerate())  # engines of models that other tests share
    engine = Engine(backend, num_slots=1, context_tokens=64, num_token_ids=NUM_TOKEN_IDS)
    assert "ernie45-engine" in [thread.name for thread in set(threading.enumerate()) - others]
    running = engine.submit(request(1, max_new_tokens=60, logit_bias={3: 100.0}))
    waiting = engine.submit(request(2))
    next_event(running)
    engine.close()
    engine.close()
    for stream in (running, waiting):
        with pytest.raises(ModelClosedError):
            drain(stream)
    with pytest.raises(ModelClosedError):
        engine.submit(request(1))
    assert "ernie45-engine" not in [thread.name for thread in set(threading.enumerate()) - others]


def test_a_seed_gives_the_same_tokens_whatever_else_is_running(engine: Engine) -> None:
    def flat(seed: int) -> TokenRequest:
        return request(20, max_new_tokens=30, temperature=5.0, top_p=1.0, seed=seed)

    alone = [drain(engine.submit(flat(seed)))[0] for seed in range(4)]
    together = [drain(stream)[0] for stream in [engine.submit(flat(seed)) for seed in range(4)]]
    assert together == alone
    assert len({tuple(ids) for ids in alone}) == 4


# A limit on reasoning. Every token's successor comes next, so what was forced shows.

END_ID = 30


def thinking(*token_ids: int, limit: int, max_new_tokens: int = 10, **options: object) -> TokenRequest:
    closing = ThinkingLimit(max_tokens=limit, end_token_id=END_ID, closing_ids=(10, END_ID, 11))
    return dataclasses.replace(request(*token_ids, max_new_tokens=max_new_tokens, **options), thinking_limit=closing)


@pytest.mark.parametrize(
    ("limit", "token_ids"),
    [
        (0, [10, END_ID, 11, 12, 13, 14, 15, 16]),
        (1, [20, 10, END_ID, 11, 12, 13, 14, 15]),
        (4, [20, 21, 22, 23, 10, END_ID, 11, 12]),
        (7, [20, 21, 22, 23, 24, 25, 26, 10]),
        (8, [20, 21, 22, 23, 24, 25, 26, 27]),
    ],
)
def test_reasoning_is_closed_at_its_limit(engine: Engine, limit: int, token_ids: list[int]) -> None:
    stream = engine.submit(thinking(19, limit=limit, max_new_tokens=8))
    assert drain(stream) == (token_ids, "length")


def test_forced_tokens_are_run_through_the_model(engine: Engine, backend: CountingBackend) -> None:
    drain(engine.submit(thinking(19, limit=2, max_new_tokens=7)))
    assert [batch.token_ids.tolist() for batch in backend.steps] == [[19], [20], [21], [10], [END_ID], [11], [12]]


@pytest.mark.parametrize("limit", [2, 3, 9])
def test_reasoning_that_ends_by_itself_is_left_alone(engine: Engine, limit: int) -> None:
    # 28, 29, and then 30 ends it, be it the very token that would have been forced.
    ids = [28, 29, END_ID, 31, 32] if limit > 2 else [28, 29, 10, END_ID, 11]
    assert drain(engine.submit(thinking(27, limit=limit, max_new_tokens=5)))[0] == ids


def test_a_limit_counts_the_reply_only(engine: Engine) -> None:
    assert drain(engine.submit(thinking(END_ID, 20, 19, limit=1, max_new_tokens=3)))[0] == [20, 10, END_ID]


def test_a_forced_token_is_no_stop_but_the_models_own_is(engine: Engine) -> None:
    closing = ThinkingLimit(max_tokens=2, end_token_id=END_ID, closing_ids=(STOP_ID, END_ID, 5))
    stream = engine.submit(dataclasses.replace(request(19, max_new_tokens=9), thinking_limit=closing))
    assert drain(stream) == ([20, 21, STOP_ID, END_ID, 5, 6, STOP_ID], "stop")
    assert drain(engine.submit(thinking(5, limit=4))) == ([6, STOP_ID], "stop")


def test_forced_tokens_count_for_penalties_and_have_logprobs(engine: Engine) -> None:
    stream = engine.submit(thinking(19, limit=0, max_new_tokens=5, logprobs=1, logit_bias={10: 2.0}))
    events = [next_event(stream) for _ in range(5)]
    assert [event.token_id for event in events] == [10, END_ID, 11, 10, 10]
    assert [event.logprob.token_id for event in events if event.logprob] == [10, END_ID, 11, 10, 10]
    assert [event.logprob.top[0][0] for event in events if event.logprob] == [20, 11, 31, 12, 11]
    penalised = thinking(19, limit=0, max_new_tokens=5, logit_bias={10: 2.0}, presence_penalty=2.0)
    assert drain(engine.submit(penalised))[0] == [10, END_ID, 11, 12, 13]


def test_a_limit_is_its_own_rows_affair(engine: Engine, backend: CountingBackend) -> None:
    backend.may_run.clear()
    requests = [thinking(19, limit=3), request(19, max_new_tokens=10), thinking(24, limit=1), thinking(23, limit=0)]
    streams = [engine.submit(each) for each in requests]
    backend.may_run.set()
    together = [drain(stream) for stream in streams]
    assert together == [drain(engine.submit(each)) for each in requests]
    assert max(len(batch.rows) for batch in backend.steps) == 2


def test_cancelling_while_tokens_are_forced_frees_the_slot(engine: Engine, backend: CountingBackend) -> None:
    closing = ThinkingLimit(max_tokens=0, end_token_id=END_ID, closing_ids=(10,) * 1500)
    stream = engine.submit(dataclasses.replace(request(1, max_new_tokens=2000), thinking_limit=closing))
    next_event(stream)
    stream.cancel()
    assert eventually(lambda: engine.num_free_slots == 2)
    assert len(backend.steps) < 1500


@pytest.mark.parametrize(("kv_dtype", "store"), [("auto", DenseStore), ("int8", Int8Store)])
def test_keys_lie_with_the_layers_and_tokens_are_drawn_with_the_head(
    backend: CountingBackend, kv_dtype: KVDtype, store: type
) -> None:
    placement = dataclasses.replace(Placement.on("cpu:0", 1), layers=("cpu:1",), head="cpu:2")
    with DeviceWatch() as made:
        engine = Engine(
            backend,
            num_slots=1,
            context_tokens=64,
            num_token_ids=NUM_TOKEN_IDS,
            kv_dtype=kv_dtype,
            placement=placement,
        )
    assert made.named == {torch.device("cpu", 1)}
    with DeviceWatch() as made:
        stream = engine.submit(request(20, logit_bias={22: 9.0}, presence_penalty=1.0))
    assert made.named == {torch.device("cpu", 2)}
    drain(stream)
    engine.close()
    assert isinstance(backend.steps[0].cache.keys[0], store)
