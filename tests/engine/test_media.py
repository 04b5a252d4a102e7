"""Pictures in the engine, with a backend that counts: what is encoded when, for whom, and what it is kept for."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence

import pytest
import torch
from torch import Tensor

from ernie45.backends.base import Batch, Step, VisionTokens
from ernie45.engine.engine import Engine
from ernie45.engine.media import CACHE_BYTES, MediaEncoder, SequenceMedia
from ernie45.errors import UnsupportedError
from ernie45.memory.workspace import PREFILL_CHUNK_TOKENS
from ernie45.presets import WeightPart
from ernie45.spec import ModelSpec, parse_spec
from ernie45.types.media import Media, PlacedMedia
from ernie45.types.requests import ThinkingLimit, TokenRequest
from tests.engine.test_engine import CountingBackend, drain, eventually, next_event, request

VOCAB_SIZE, HIDDEN_SIZE = 50, 4
START, HERE, END = 42, 43, 44  # a picture's tokens, above all that is drawn
BROKEN = 255  # patches of this colour cannot be encoded


def vision_spec() -> ModelSpec:
    return parse_spec(
        {
            "model_type": "ernie4_5_moe_vl",
            "hidden_size": HIDDEN_SIZE,
            "intermediate_size": 4,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "head_dim": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "freq_allocation": 2,
            "vocab_size": VOCAB_SIZE,
            "moe_num_experts": [2, 2],
            "moe_k": 1,
            "moe_intermediate_size": [4, 4],
            "vision_config": {"depth": 1, "hidden_size": 8, "num_heads": 1, "patch_size": 1},
        }
    )


class SeeingBackend:
    """Says of every token that its successor comes next. `log` has the steps' batches and the encoded grids, in the
    order they came in; features are the colour of the patches."""

    def __init__(self) -> None:
        self.spec = vision_spec()
        self.dtype = torch.float32
        self.device = torch.device("cpu")
        self.weight_bytes: Mapping[WeightPart, int] = {}
        self.log: list[Batch | tuple[int, int, int]] = []
        self.may_encode = threading.Event()
        self.may_encode.set()
        self.in_encode = threading.Event()

    @property
    def steps(self) -> list[Batch]:
        return [entry for entry in self.log if isinstance(entry, Batch)]

    @property
    def encoded(self) -> list[tuple[int, int, int]]:
        return [entry for entry in self.log if not isinstance(entry, Batch)]

    def forward(self, batch: Batch) -> Step:
        self.log.append(batch)
        following = (batch.token_ids[batch.wanted] + 1) % VOCAB_SIZE
        return Step(logits=torch.nn.functional.one_hot(following, VOCAB_SIZE).float())

    def encode(self, patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
        self.in_encode.set()
        assert self.may_encode.wait(10)
        self.log.append(grid)
        assert len(patches) == grid[0] * grid[1] * grid[2]
        if int(patches.max()) == BROKEN:
            raise ArithmeticError("broken picture")
        num_tokens = len(patches) // 4 // (1 if grid[0] == 1 else 2)
        colours = patches[:, 0].float().view(num_tokens, -1).amax(1)
        return colours[:, None].expand(-1, HIDDEN_SIZE).clone()


@pytest.fixture
def backend() -> SeeingBackend:
    return SeeingBackend()


@pytest.fixture
def engine(backend: SeeingBackend) -> Iterator[Engine]:
    engine = Engine(backend, num_slots=2, context_tokens=4096, num_token_ids=40)
    yield engine
    backend.may_encode.set()
    engine.close()


def picture(colour: int, rows: int = 2, columns: int = 4) -> Media:
    return media("image", (1, rows, columns), colour)


def clip(colour: int, num_frames: int, rows: int = 2, columns: int = 4) -> Media:
    return media("video", (num_frames, rows, columns), colour)


def media(kind: str, grid: tuple[int, int, int], colour: int) -> Media:
    num_patches = grid[0] * grid[1] * grid[2]
    return Media(
        kind="image" if kind == "image" else "video",
        patches=torch.full((num_patches, 3), colour, dtype=torch.uint8),
        grid=grid,
        num_tokens=num_patches // 4 // (1 if grid[0] == 1 else 2),
        digest=f"{kind}{grid}{colour}".encode(),
    )


def asking(*parts: int | Media, **options: int) -> TokenRequest:
    """A request of token ids and media, each between its markers."""
    ids: list[int] = []
    placed = []
    for part in parts:
        if isinstance(part, int):
            ids.append(part)
            continue
        placed.append(PlacedMedia(first=len(ids) + 1, media=part))
        ids += [START, *[HERE] * part.num_tokens, END]
    return dataclasses.replace(request(*ids, **options), media=tuple(placed))


def prefill_steps(backend: SeeingBackend) -> list[VisionTokens | None]:
    return [batch.vision for batch in backend.steps if any(row.start == 0 or row.num_tokens > 1 for row in batch.rows)]


# What is computed


def test_the_tokens_of_a_picture_are_told_from_text(engine: Engine, backend: SeeingBackend) -> None:
    assert drain(engine.submit(asking(5, 6, picture(7), 20))) == ([21, 22, 23], "length")
    assert backend.encoded == [(1, 2, 4)]
    first, *later = backend.steps
    assert first.token_ids.tolist() == [5, 6, START, HERE, HERE, END, 20]
    vision = first.vision
    assert vision is not None
    assert (vision.text.tolist(), vision.routed.tolist(), vision.embedded.tolist()) == ([0, 1, 6], [2, 3, 4, 5], [3, 4])
    assert torch.equal(vision.features, torch.full((2, HIDDEN_SIZE), 7.0))
    assert first.rotary_positions is not None
    # The picture begins at 3, on 1 x 2 tokens; the text goes on after its columns.
    grid = [[3, 3, 3], [3, 3, 4]]
    assert first.rotary_positions.tolist() == [[0] * 3, [1] * 3, [2] * 3, *grid, [5] * 3, [6] * 3]
    assert first.positions.tolist() == list(range(7))
    # What is generated is text, and counts on from there.
    assert [batch.vision for batch in later] == [None, None]
    assert [batch.rotary_positions.tolist() for batch in later if batch.rotary_positions is not None] == [
        [[7] * 3],
        [[8] * 3],
    ]
    assert [batch.positions.tolist() for batch in later] == [[7], [8]]


def test_a_clip_counts_in_time(engine: Engine, backend: SeeingBackend) -> None:
    drain(engine.submit(asking(5, clip(7, num_frames=6, rows=2, columns=2), 20)))
    first, second, _ = backend.steps
    assert first.rotary_positions is not None
    assert first.rotary_positions[2:5].tolist() == [[2, 2, 2], [3, 2, 2], [4, 2, 2]]
    assert first.rotary_positions[5:].tolist() == [[5] * 3, [6] * 3]
    assert second.rotary_positions is not None
    assert second.rotary_positions.tolist() == [[7] * 3]


def test_each_picture_gets_its_own_features(engine: Engine, backend: SeeingBackend) -> None:
    drain(engine.submit(asking(picture(7), picture(9, 2, 2), 5, picture(7), 20)))
    assert backend.encoded == [(1, 2, 4), (1, 2, 2)]  # the third is the first again
    vision = backend.steps[0].vision
    assert vision is not None
    assert vision.features[:, 0].tolist() == [7, 7, 9, 7, 7]
    assert vision.embedded.tolist() == [1, 2, 5, 9, 10]
    assert vision.text.tolist() == [7, 12]


def test_text_alone_costs_no_vision(engine: Engine, backend: SeeingBackend) -> None:
    drain(engine.submit(request(20)))
    long = [1] * (PREFILL_CHUNK_TOKENS + 3)
    assert drain(engine.submit(request(*long)))[0] == [2, 3, 4]
    assert backend.encoded == []
    assert all(batch.vision is None and batch.rotary_positions is None for batch in backend.steps)


@pytest.mark.parametrize("num_before", [505, 508, 509, 510, 511, 512, 513])
def test_chunks_share_a_picture_at_their_edge(engine: Engine, backend: SeeingBackend, num_before: int) -> None:
    # The marker stands at num_before, then 4 placeholders and the end marker.
    asked = asking(*[1] * num_before, picture(7, 4, 4), 20, 21)
    assert drain(engine.submit(asked))[0] == [22, 23, 24]
    first, second = backend.steps[:2]
    routed: list[int] = []
    embedded: list[int] = []
    text: list[int] = []
    for batch in (first, second):
        start, own = int(batch.positions[0]), batch.vision
        if own is None:
            text += range(start, start + len(batch.token_ids))
            continue
        text += (own.text + start).tolist()
        routed += (own.routed + start).tolist()
        embedded += (own.embedded + start).tolist()
        assert len(own.features) == len(own.embedded)
    assert routed == list(range(num_before, num_before + 6))
    assert embedded == routed[1:-1]
    assert sorted(text + routed) == list(range(num_before + 8))
    assert (first.vision is None) == (num_before >= 512)
    assert backend.encoded == [(1, 4, 4)]


def test_rows_with_and_without_pictures_decode_together(engine: Engine, backend: SeeingBackend) -> None:
    backend.may_encode.clear()
    with_picture = engine.submit(asking(picture(7, 4, 4), 20, max_new_tokens=6))
    plain = engine.submit(request(9, max_new_tokens=6))
    backend.may_encode.set()
    assert drain(with_picture)[0] == [21, 22, 23, 24, 25, 26]
    assert drain(plain)[0] == [10, 11, 12, 13, 14, 15]
    mixed = [batch for batch in backend.steps if len(batch.rows) == 2]
    assert mixed
    for batch in mixed:
        assert batch.vision is None
        assert batch.rotary_positions is not None
        # The four tokens of the picture took two places, as it has two rows and columns.
        assert (batch.positions[:, None] - batch.rotary_positions).tolist() == [[2] * 3, [0] * 3]


# What is remembered


def test_a_second_question_on_the_same_picture_encodes_nothing(engine: Engine, backend: SeeingBackend) -> None:
    drain(engine.submit(asking(picture(7), 20)))
    drain(engine.submit(asking(5, picture(7), picture(7), 30)))
    assert backend.encoded == [(1, 2, 4)]
    drain(engine.submit(asking(5, picture(8), 30)))
    assert len(backend.encoded) == 2
    last = backend.steps[3].vision
    assert last is not None
    assert last.features[:, 0].tolist() == [7, 7, 7, 7]


def test_questions_asked_at_once_share_the_encoding(engine: Engine, backend: SeeingBackend) -> None:
    backend.may_encode.clear()
    streams = [engine.submit(asking(picture(7), 20 + number)) for number in range(4)]
    backend.may_encode.set()
    assert [drain(stream)[0][0] for stream in streams] == [21, 22, 23, 24]
    assert backend.encoded == [(1, 2, 4)]


def features_of(encoder: MediaEncoder, item: Media) -> Tensor:
    """As a sequence gets them."""
    sequence = SequenceMedia([PlacedMedia(first=1, media=item)], num_prompt_tokens=item.num_tokens + 2, merge_size=2)
    while not sequence.encoded:
        sequence.encode(encoder)
    vision = sequence.tokens(0, item.num_tokens + 2, torch.device("cpu"))
    assert vision is not None
    return vision.features


def test_the_cache_is_bounded_in_bytes_and_drops_what_was_used_longest_ago(backend: SeeingBackend) -> None:
    one = 2 * HIDDEN_SIZE * 4  # bytes of the features of a picture of two tokens
    encoder = MediaEncoder(backend, cache_bytes=3 * one)
    first, second, third, fourth = (picture(colour) for colour in (1, 2, 3, 4))
    for item in (first, second, third):
        features_of(encoder, item)
    assert all(encoder.known(item) is not None for item in (second, third, first))  # first is the latest now
    features_of(encoder, fourth)
    assert [encoder.known(item) is not None for item in (first, second, third, fourth)] == [True, False, True, True]
    # One of twice the size takes the place of two.
    features_of(encoder, picture(5, 4, 4))
    assert [encoder.known(item) is not None for item in (first, third, fourth)] == [False, False, True]
    # What is larger than the cache is not kept, and drives nothing out.
    large = picture(6, 8, 8)
    assert features_of(encoder, large)[:, 0].tolist() == [6.0] * 16
    assert encoder.known(large) is None
    assert encoder.known(fourth) is not None
    num_encoded = len(backend.encoded)
    features_of(encoder, fourth)
    assert len(backend.encoded) == num_encoded
    assert CACHE_BYTES == 256 * 2**20


def test_what_was_dropped_is_encoded_again(backend: SeeingBackend) -> None:
    encoder = MediaEncoder(backend, cache_bytes=1)
    for _ in range(2):
        assert features_of(encoder, picture(7))[:, 0].tolist() == [7, 7]
    assert backend.encoded == [(1, 2, 4)] * 2


# Clips, which take long


def test_other_rows_decode_between_the_parts_of_a_clip(engine: Engine, backend: SeeingBackend) -> None:
    long = clip(7, num_frames=8, rows=40, columns=40)  # 1,600 patches a frame: two frames at a time
    backend.may_encode.clear()
    seeing = engine.submit(asking(long, 20))
    assert backend.in_encode.wait(10)
    running = engine.submit(request(8, max_new_tokens=30))
    backend.may_encode.set()
    drain(running)
    assert drain(seeing) == ([21, 22, 23], "length")
    assert backend.encoded == [(2, 40, 40)] * 4
    places = [index for index, entry in enumerate(backend.log) if not isinstance(entry, Batch)]
    # The other request joins after the first part; from then on there is a step between two parts.
    assert all(later - earlier >= 2 for earlier, later in itertools.pairwise(places[1:]))
    features = torch.cat([batch.vision.features for batch in backend.steps if batch.vision is not None])
    assert features[:, 0].tolist() == [7.0] * long.num_tokens


def test_a_picture_is_encoded_in_a_turn_of_its_own(backend: SeeingBackend) -> None:
    engine = Engine(backend, num_slots=5, context_tokens=4096, num_token_ids=40)
    running = engine.submit(request(8, max_new_tokens=4000, logit_bias={3: 100.0}))
    next_event(running)
    backend.may_encode.clear()
    first = engine.submit(asking(picture(7), 20))
    assert backend.in_encode.wait(10)
    later = [engine.submit(asked) for asked in (request(9, 9), asking(picture(8), 20), asking(picture(9), 21))]
    backend.may_encode.set()
    for stream in (first, *later):
        drain(stream)
    engine.close()
    turns: list[list[str]] = [[]]
    for entry in backend.log:
        if isinstance(entry, Batch) and entry.rows[0].start:
            turns.append([])  # one ends with the tokens of running rows
        else:
            turns[-1].append("prefill" if isinstance(entry, Batch) else "encode")
    assert turns.count(["encode"]) == 3
    assert sum("encode" in turn for turn in turns) == 3


def test_a_clip_of_small_frames_is_encoded_at_once_and_a_huge_frame_with_its_pair(backend: SeeingBackend) -> None:
    encoder = MediaEncoder(backend)
    features_of(encoder, clip(1, num_frames=180, rows=2, columns=2))
    features_of(encoder, clip(1, num_frames=10, rows=20, columns=40))  # 5.12 frames: 4
    features_of(encoder, clip(1, num_frames=4, rows=60, columns=80))
    features_of(encoder, picture(1, 100, 100))
    parts = [(180, 2, 2), (4, 20, 40), (4, 20, 40), (2, 20, 40), (2, 60, 80), (2, 60, 80), (1, 100, 100)]
    assert backend.encoded == parts


def test_cancelling_while_a_clip_is_encoded_frees_the_slot(engine: Engine, backend: SeeingBackend) -> None:
    backend.may_encode.clear()
    stream = engine.submit(asking(clip(7, num_frames=40, rows=40, columns=40), 20))
    assert backend.in_encode.wait(10)
    stream.cancel()
    backend.may_encode.set()
    assert eventually(lambda: engine.num_free_slots == 2)
    assert len(backend.encoded) < 20
    assert backend.steps == []
    assert drain(engine.submit(request(20)))[0] == [21, 22, 23]


def test_a_picture_that_fails_ends_its_request_alone(engine: Engine, backend: SeeingBackend) -> None:
    backend.may_encode.clear()
    broken = engine.submit(asking(picture(BROKEN), 20))
    good = engine.submit(asking(picture(7), 20))
    backend.may_encode.set()
    assert drain(good) == ([21, 22, 23], "length")
    with pytest.raises(ArithmeticError, match="broken picture"):
        drain(broken)
    assert eventually(lambda: engine.num_free_slots == 2)
    assert drain(engine.submit(asking(picture(8), 20)))[0] == [21, 22, 23]


# Other requests with media


def test_a_text_model_takes_no_media() -> None:
    engine = Engine(CountingBackend(), num_slots=1, context_tokens=64, num_token_ids=40)
    try:
        with pytest.raises(UnsupportedError, match="has 1 pictures or clips, and this model reads text only") as caught:
            engine.submit(asking(picture(7), 20))
        assert caught.value.hint
        assert engine.num_free_slots == 1
    finally:
        engine.close()


def test_scoring_a_prompt_with_a_picture(engine: Engine, backend: SeeingBackend) -> None:
    asked = asking(5, picture(7), 20, 21)
    positions: Sequence[int] = range(len(asked.token_ids))
    given: list[Tensor] = []
    stream = engine.submit(dataclasses.replace(asked, logit_positions=tuple(positions), on_logits=given.append))
    assert next_event(stream).finish_reason == "stop"
    assert given[0].argmax(-1).tolist() == [(token_id + 1) % VOCAB_SIZE for token_id in asked.token_ids]
    assert backend.encoded == [(1, 2, 4)]


def test_reasoning_about_a_picture_is_limited_like_any(engine: Engine) -> None:
    limit = ThinkingLimit(max_tokens=2, end_token_id=30, closing_ids=(10, 30, 11))
    stream = engine.submit(dataclasses.replace(asking(picture(7), 20, max_new_tokens=7), thinking_limit=limit))
    assert drain(stream) == ([21, 22, 10, 30, 11, 12, 13], "length")


def test_closing_while_a_clip_is_encoded_ends_its_request(backend: SeeingBackend) -> None:
    from ernie45.errors import ModelClosedError

    engine = Engine(backend, num_slots=1, context_tokens=4096, num_token_ids=40)
    backend.may_encode.clear()
    stream = engine.submit(asking(clip(7, num_frames=40, rows=40, columns=40), 20))
    assert backend.in_encode.wait(10)
    threading.Timer(0.1, backend.may_encode.set).start()
    engine.close()
    with pytest.raises(ModelClosedError):
        drain(stream)


def test_a_picture_for_a_closed_engine_is_refused_like_text(engine: Engine) -> None:
    from ernie45.errors import ModelClosedError

    engine.close()
    with pytest.raises(ModelClosedError):
        engine.submit(asking(picture(7), 20))


def test_a_short_prompt_does_not_wait_for_a_long_clip(engine: Engine, backend: SeeingBackend) -> None:
    backend.may_encode.clear()
    seeing = engine.submit(asking(clip(7, num_frames=20, rows=40, columns=40), 20))
    assert backend.in_encode.wait(10)
    short = engine.submit(request(8, max_new_tokens=2))
    backend.may_encode.set()
    drain(short)
    drain(seeing)
    first_text_step = next(i for i, entry in enumerate(backend.log) if isinstance(entry, Batch))
    assert 1 <= first_text_step < 4, "before the ten parts of the clip are done"


def test_features_are_let_go_once_the_prompt_is_read(backend: SeeingBackend) -> None:
    asked = asking(picture(7), 20)
    item = SequenceMedia(asked.media, num_prompt_tokens=len(asked.token_ids), merge_size=2)
    encoder = MediaEncoder(backend)
    while not item.encoded:
        item.encode(encoder)
    after = len(asked.token_ids)
    expected = item.positions(after, after + 2).tolist()
    item.release()
    assert item.positions(after, after + 2).tolist() == expected
    assert item._features == []
