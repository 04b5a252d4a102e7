"""What is staged is what the files hold, wherever it begins and ends; what cannot be read is said, and never used."""

from __future__ import annotations

import errno
import os
import random
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from ernie45.checkpoint.headers import TensorInfo
from ernie45.checkpoint.open import Checkpoint, expert_tensors, open_checkpoint, open_source, read_config
from ernie45.checkpoint.read import PackedSource, TensorSource
from ernie45.checkpoint.staged_reads import StagedReader
from ernie45.errors import CheckpointError, CorruptFileError, OutOfMemoryError
from ernie45.presets import PRESETS
from ernie45.saving import save_checkpoint
from ernie45.spec import parse_spec
from tests.gptq_files import write_gptq_folder
from tests.paddle_files import CONFIG, EXPERTS, FileLayout, FloatDtype, random_pt, write_checkpoint

CPU = torch.device("cpu")
WIDE: dict[str, Any] = {**CONFIG, **EXPERTS, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32}
EXPERT = "model.layers.2.mlp.experts.3."
GATE_UP = {f"{EXPERT}gate_proj": 32, f"{EXPERT}up_proj": 32}
DOWN = {f"{EXPERT}down_proj": 64}
needs_direct = pytest.mark.skipif(sys.platform != "linux", reason="reads past the page cache are Linux's")


@pytest.fixture(scope="module")
def content() -> bytes:
    """Bytes that never repeat; their number is no multiple of a block."""
    return random.Random(0).randbytes(1_000_003)


@pytest.fixture
def file(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    return path


@pytest.fixture(params=["direct", "refused at opening", "refused at reading"])
def any_file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the file system under the tests is, and as ones that refuse direct reads are."""
    if request.param == "refused at opening":
        refuse_direct_opens(monkeypatch, errno.EINVAL)
    elif request.param == "refused at reading":
        refuse_direct_reads(monkeypatch, errno.EOPNOTSUPP)


def refuse_direct_opens(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    open_file = os.open

    def refusing(path: Path, flags: int, *arguments: Any, **options: Any) -> int:
        if flags & getattr(os, "O_DIRECT", 0):
            raise OSError(number, os.strerror(number), str(path))
        return open_file(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", refusing)


def refuse_direct_reads(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    import fcntl

    read = os.preadv

    def refusing(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0):
            raise OSError(number, os.strerror(number))
        return read(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", refusing)


def stored_at(file: Path, start: int, stop: int) -> TensorInfo:
    return TensorInfo(
        name=f"w{start}", file=file, dtype="U8", shape=(stop - start,), start=start, num_bytes=stop - start
    )


def staged_bytes(reader: StagedReader, info: TensorInfo) -> bytes:
    view = reader.view(info)
    assert view is not None
    return bytes(view)


@pytest.mark.usefixtures("any_file_system")
@pytest.mark.parametrize(
    "ranges",
    [
        [(0, 4096)],
        [(1, 2)],
        [(4095, 4097)],
        [(4096, 8192)],
        [(4000, 300_001)],
        [(999_990, 1_000_003)],
        [(999_424, 999_424)],
        [(0, 1_000_003)],
        [(700, 900), (900, 5000), (5000, 5001)],
        [(900_000, 1_000_003), (100, 9000), (200_000, 200_000)],
        [(100, 200), (60_000, 61_000), (200_000, 300_000), (400_001, 400_002)],
    ],
)
def test_what_is_staged_is_what_the_file_holds(file: Path, content: bytes, ranges: list[tuple[int, int]]) -> None:
    infos = [stored_at(file, *ends) for ends in ranges]
    reader = StagedReader()
    reader.stage(infos)
    for info, (start, stop) in zip(infos, ranges, strict=True):
        assert staged_bytes(reader, info) == content[start:stop]
        target = bytearray(stop - start)
        assert reader.read(file, start, memoryview(target)) == stop - start
        assert bytes(target) == content[start:stop]


def test_tensors_of_several_files_are_staged_together(tmp_path: Path, content: bytes) -> None:
    infos = []
    for number in (2, 0, 1):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(content[number:])
        infos += [stored_at(path, 5, 10_000), stored_at(path, 500_000, 500_001)]
    reader = StagedReader()
    reader.stage(infos)
    for info in infos:
        number = int(info.file.stem)
        assert staged_bytes(reader, info) == content[number:][info.start : info.start + info.num_bytes]


def test_neighbours_are_read_at_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[int] = []
    read = os.preadv

    def counting(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        starts.append(offset)
        return read(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", counting)
    reader = StagedReader()
    reader.stage([stored_at(file, 9000, 9500), stored_at(file, 8200, 9000), stored_at(file, 60_000, 70_000)])
    assert len(starts) == 1
    reader.stage([stored_at(file, 8200, 9000), stored_at(file, 90_000, 91_000)])
    assert len(starts) == 3


@needs_direct
def test_reads_go_past_the_page_cache(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags_used: list[int] = []
    open_file = os.open

    def recording(path: Path, flags: int, *arguments: Any, **options: Any) -> int:
        flags_used.append(flags)
        return open_file(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", recording)
    StagedReader().stage([stored_at(file, 100, 200_000)])
    assert flags_used[0] & os.O_DIRECT


@needs_direct
def test_where_they_cannot_pages_are_dropped(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dropped: list[tuple[int, int]] = []
    refuse_direct_opens(monkeypatch, errno.EINVAL)

    def recording(descriptor: int, start: int, num_bytes: int, advice: int) -> None:
        if advice == os.POSIX_FADV_DONTNEED:
            dropped.append((start, num_bytes))

    monkeypatch.setattr(os, "posix_fadvise", recording)
    StagedReader().stage([stored_at(file, 100, 200_000), stored_at(file, 300_000, 300_010)])
    assert dropped == [(100, 199_900), (300_000, 10)]


def test_staging_drops_what_was_staged_before_and_uses_its_memory_again(file: Path, content: bytes) -> None:
    reader = StagedReader()
    large, small = stored_at(file, 10, 500_000), stored_at(file, 700_001, 700_101)
    reader.stage([large])
    view = reader.view(large)
    assert view is not None
    reader.stage([small])
    assert reader.view(large) is None
    assert staged_bytes(reader, small) == content[700_001:700_101]
    reader.stage([large])
    again = reader.view(large)
    assert again is not None
    assert torch.frombuffer(again, dtype=torch.uint8).data_ptr() == torch.frombuffer(view, dtype=torch.uint8).data_ptr()
    assert bytes(again) == content[10:500_000]


@pytest.mark.usefixtures("any_file_system")
def test_what_is_not_staged_is_read_from_its_file(file: Path, content: bytes) -> None:
    reader = StagedReader()
    reader.stage([stored_at(file, 10, 20)])
    target = bytearray(100)
    assert reader.read(file, 15, memoryview(target)) == 100
    assert bytes(target) == content[15:115]
    assert reader.read(file, len(content) - 30, memoryview(target)) == 30
    assert bytes(target[:30]) == content[-30:]
    assert reader.view(stored_at(file, 15, 21)) is None
    assert reader.view(stored_at(file.with_name("other"), 10, 20)) is None


@pytest.mark.usefixtures("any_file_system")
def test_short_reads_are_continued(file: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    read = os.preadv

    def short(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        return read(descriptor, [buffers[0][: 3 * 4096]], offset)

    monkeypatch.setattr(os, "preadv", short)
    reader, info = StagedReader(), stored_at(file, 4000, len(content))
    reader.stage([info])
    assert staged_bytes(reader, info) == content[4000:]


@pytest.mark.usefixtures("any_file_system")
@pytest.mark.parametrize("left", [0, 100, 5000, 100_000, 199_999])
def test_a_truncated_file_is_an_error_until_it_is_whole(file: Path, content: bytes, left: int) -> None:
    reader, info = StagedReader(), stored_at(file, 5000, 200_000)
    reader.stage([info])
    file.write_bytes(content[:left])
    with pytest.raises(CorruptFileError, match="is cut short") as caught:
        reader.stage([info])
    assert str(file) in caught.value.message
    assert f"{left} in all" in caught.value.message
    assert reader.view(info) is None
    file.write_bytes(content)
    reader.stage([info])
    assert staged_bytes(reader, info) == content[5000:200_000]


@pytest.mark.usefixtures("any_file_system")
def test_a_file_that_is_gone_is_an_error_until_it_is_back(file: Path, content: bytes) -> None:
    reader, info = StagedReader(), stored_at(file, 5000, 200_000)
    reader.stage([info])
    away = file.rename(file.with_name("away"))
    with pytest.raises(CheckpointError, match="No such file") as caught:
        reader.stage([info])
    assert str(file) in caught.value.message
    with pytest.raises(CheckpointError, match="No such file"):
        reader.read(file, 5000, memoryview(bytearray(10)))
    away.rename(file)
    reader.stage([info])
    assert staged_bytes(reader, info) == content[5000:200_000]


def test_a_file_that_may_not_be_opened_is_an_error(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_direct_opens(monkeypatch, errno.EACCES)
    if not hasattr(os, "O_DIRECT"):
        file.chmod(0)
    with pytest.raises(CheckpointError, match="Permission denied") as caught:
        StagedReader().stage([stored_at(file, 0, 10)])
    assert str(file) in caught.value.message


def test_a_failing_disk_is_an_error_until_it_works(file: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, info = StagedReader(), stored_at(file, 5000, 200_000)
    with monkeypatch.context() as broken:

        def fail(descriptor: int, buffers: list[memoryview], offset: int) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        broken.setattr(os, "preadv", fail)
        with pytest.raises(CheckpointError, match=os.strerror(errno.EIO)) as caught:
            reader.stage([info])
        assert str(file) in caught.value.message
        assert reader.view(info) is None
    reader.stage([info])
    assert staged_bytes(reader, info) == content[5000:200_000]


def test_what_no_memory_can_hold_is_an_error(file: Path) -> None:
    with pytest.raises(OutOfMemoryError, match=f"{1 << 60:,}"):
        StagedReader().stage([stored_at(file, 0, 1 << 60)])


def test_two_readers_work_at_once(file: Path, content: bytes) -> None:
    wrong: list[tuple[int, int]] = []

    def work(seed: int) -> None:
        draw, reader = random.Random(seed), StagedReader()
        for _ in range(100):
            start = draw.randrange(len(content))
            stop = draw.randrange(start, len(content) + 1)
            info = stored_at(file, start, stop)
            reader.stage([info])
            if staged_bytes(reader, info) != content[start:stop]:
                wrong.append((start, stop))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def opened(folder: Path) -> Checkpoint:
    config = read_config(folder)
    return open_checkpoint(folder, config, parse_spec(config))


def staged_and_moved(checkpoint: Checkpoint) -> TensorSource:
    """A source whose reader has staged EXPERT, while the files are now somewhere else: who wants another byte fails."""
    reader = StagedReader()
    source = open_source(checkpoint, reader=reader)
    reader.stage(expert_tensors(checkpoint)[EXPERT])
    checkpoint.folder.rename(checkpoint.folder.with_name("moved"))
    return source


@pytest.mark.parametrize("layout", ["pt", "paddle", "paddleformers"])
@pytest.mark.parametrize("has_biases", [False, True])
def test_an_expert_is_read_from_what_is_staged(tmp_path: Path, layout: FileLayout, has_biases: bool) -> None:
    tensors = random_pt(WIDE, expert_biases=has_biases)
    dtype: FloatDtype = "BF16" if layout == "pt" else "U16"
    folder = write_checkpoint(tmp_path / "model", tensors, WIDE, layout=layout, dtype=dtype, num_shards=3)
    source = staged_and_moved(opened(folder))
    for leaf in ("gate_proj", "up_proj", "down_proj"):
        for kind in ("weight", "bias")[: 1 + has_biases]:
            stored = torch.from_numpy(tensors[f"{EXPERT}{leaf}.{kind}"])
            out = torch.empty(stored.shape, dtype=torch.bfloat16)
            source.read_into(out, {f"{EXPERT}{leaf}.{kind}": len(out)})
            assert torch.equal(out.float(), stored)


@pytest.mark.parametrize("preset", ["int4", "int8"])
def test_a_packed_expert_lies_in_what_is_staged(tmp_path: Path, preset: str) -> None:
    plain = write_checkpoint(tmp_path / "plain", random_pt(WIDE), WIDE, layout="pt", dtype="BF16")
    save_checkpoint(plain, tmp_path / "packed", PRESETS[preset], progress=False)
    assert_packed_as_without_reader(opened(tmp_path / "packed"))


def test_a_gptq_expert_is_read_from_what_is_staged(tmp_path: Path) -> None:
    plain = write_checkpoint(tmp_path / "plain", random_pt(WIDE), WIDE, layout="pt")
    write_gptq_folder(plain, tmp_path / "gptq", tmp_path / "reference")
    assert_packed_as_without_reader(opened(tmp_path / "gptq"))


def assert_packed_as_without_reader(checkpoint: Checkpoint) -> None:
    without = open_source(checkpoint)
    assert isinstance(without, PackedSource)
    expected = [without.read_packed(GATE_UP, 64, CPU), without.read_packed(DOWN, 32, CPU)]
    source = staged_and_moved(checkpoint)
    assert isinstance(source, PackedSource)
    for wanted, found in zip(
        expected, (source.read_packed(GATE_UP, 64, CPU), source.read_packed(DOWN, 32, CPU)), strict=True
    ):
        assert wanted is not None
        assert found is not None
        for one, other in zip(wanted, found, strict=True):
            assert one.tensors().keys() == other.tensors().keys()
            for leaf, tensor in one.tensors().items():
                assert torch.equal(tensor, other.tensors()[leaf])


def test_packed_matrices_are_not_mapped_with_a_reader(tmp_path: Path) -> None:
    plain = write_checkpoint(tmp_path / "plain", random_pt(WIDE), WIDE, layout="pt", dtype="BF16")
    save_checkpoint(plain, tmp_path / "packed", PRESETS["int4"], progress=False)
    checkpoint = opened(tmp_path / "packed")
    reader = StagedReader()
    source = open_source(checkpoint, reader=reader)
    assert isinstance(source, PackedSource)
    reader.stage(expert_tensors(checkpoint)[EXPERT])
    staged = source.read_packed(DOWN, 32, CPU)
    assert staged is not None
    view = reader.view(checkpoint.index.tensors[f"{EXPERT}down_proj.codes"])
    assert view is not None
    assert staged[0].codes.data_ptr() == torch.frombuffer(view, dtype=torch.uint8).data_ptr()

    without = open_source(checkpoint)
    assert isinstance(without, PackedSource)
    other = {name.replace("experts.3", "experts.0"): rows for name, rows in DOWN.items()}
    not_staged, expected = source.read_packed(other, 32, CPU), without.read_packed(other, 32, CPU)
    assert not_staged is not None
    assert expected is not None
    for leaf, tensor in expected[0].tensors().items():
        assert torch.equal(tensor, not_staged[0].tensors()[leaf])
    (tmp_path / "packed").rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="No such file"):
        source.read_packed(other, 32, CPU)


@pytest.mark.parametrize("layout", ["pt", "paddle", "paddleformers"])
def test_the_tensors_of_each_expert_are_found(tmp_path: Path, layout: FileLayout) -> None:
    folder = write_checkpoint(tmp_path, random_pt(WIDE, expert_biases=True), WIDE, layout=layout)
    checkpoint = opened(folder)
    experts = expert_tensors(checkpoint)
    assert set(experts) == {f"model.layers.{layer}.mlp.experts.{number}." for layer in (1, 2) for number in range(4)}
    for prefix, infos in experts.items():
        wanted = {
            checkpoint.layout.locate(f"{prefix}{leaf}.{kind}").key
            for leaf in ("gate_proj", "up_proj", "down_proj")
            for kind in ("weight", "bias")
        }
        assert sorted(info.name for info in infos) == sorted(wanted)
