from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import fields, replace
from importlib import metadata
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch

from ernie45.cli import main
from ernie45.commands import doctor
from ernie45.commands.doctor import Diagnosis, diagnose
from ernie45.kernels import library
from ernie45.memory.machine import has_cuda_driver

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guide" / "installation.md"

HEALTHY = Diagnosis(
    ernie45="0.1.0",
    python="3.11.7",
    torch="2.13.0+cpu",
    transformers="5.23.0",
    system="Linux x86_64",
    processor="AMD EPYC 9654",
    num_cores=8,
    num_cpus=16,
    num_usable_cpus=4,
    instruction_set="avx512bf16",
    instruction_sets=("avx512bf16", "avx512vnni", "avx2", "portable"),
    why_no_kernels=None,
    memory_bytes=64 * 2**30,
    available_memory_bytes=20 * 2**30,
    memory_limit_bytes=24 * 2**30,
    gpus=(),
    hub_cache="/home/me/.cache/huggingface/hub",
    free_disk_bytes=310 * 2**30,
    advice=(),
)
ILL = replace(
    HEALTHY,
    transformers=None,
    num_cores=2,
    num_cpus=2,
    num_usable_cpus=2,
    instruction_set=None,
    instruction_sets=(),
    why_no_kernels="no library was built: cc failed:\nkernels.c:1: error: it is too hot",
    memory_limit_bytes=None,
    gpus=("H100 with 79.00 GiB", "L4 with 22.00 GiB"),
    advice=("Have a C compiler, " * 9 + "and install:\npip install " + "--option " * 12, "Buy more memory."),
)


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_loaded", lambda: "no library was built: no C compiler was found")


def test_the_guide_shows_a_healthy_machine() -> None:
    (shown,) = re.findall(r"```console\n\$ ernie45 doctor\n((?s:.*?))```", GUIDE.read_text(encoding="utf-8"))
    assert f"{HEALTHY}\n" == shown


def test_what_is_missing_is_said() -> None:
    lines = str(ILL).splitlines()
    assert "transformers  not installed" in lines
    assert "Processor     AMD EPYC 9654, 2 cores" in lines
    assert "Memory        20.00 GiB free of 64.00 GiB" in lines
    assert "GPUs          H100 with 79.00 GiB, L4 with 22.00 GiB" in lines
    start = lines.index("Kernels       torch's, not native: no library was built: cc failed:")
    assert lines[start + 1] == " " * 16 + "kernels.c:1: error: it is too hot"


def test_commands_are_left_whole() -> None:
    first, *rest = str(ILL).partition("To do")[2].splitlines()
    assert first.startswith("         Have a C compiler, ")
    assert rest[-2:] == [" " * 16 + "pip install " + "--option " * 12, " " * 14 + "Buy more memory."]
    assert max(map(len, rest[:-2])) <= 100


def test_json_has_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {field.name for field in fields(Diagnosis)}
    assert json.loads(HEALTHY.to_json())["instruction_sets"] == ["avx512bf16", "avx512vnni", "avx2", "portable"]


def test_the_guide_names_every_key() -> None:
    table = GUIDE.read_text(encoding="utf-8").partition("| key |")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", table)) == {field.name for field in fields(Diagnosis)}


@pytest.mark.skipif(
    has_cuda_driver() or sys.platform == "darwin", reason="torch is asked about the GPU of this machine"
)
def test_the_command_is_quick_because_it_leaves_torch_alone() -> None:
    program = "import sys; from ernie45.cli import main; main(['doctor']); print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("ernie45       0.1.0\nPython        ")
    assert run.stdout.endswith("\nFalse\n")


def test_this_machine() -> None:
    found = diagnose()
    assert found.torch == metadata.version("torch")
    assert 1 <= found.num_usable_cpus <= found.num_cpus
    assert 0 < found.available_memory_bytes <= found.memory_bytes
    assert found.free_disk_bytes > 0
    assert found.processor
    assert (found.instruction_set is None) == (found.why_no_kernels is not None)
    assert found.instruction_sets == library.instruction_sets()


@pytest.mark.usefixtures("no_library")
def test_without_kernels_there_is_something_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    output = capsys.readouterr().out
    assert "Kernels       torch's, not native: no library was built: no C compiler was found\n" in output
    assert "To do         Without native kernels a CPU is slower" in output
    assert f"  {sys.executable} -m pip install --force-reinstall --no-deps " in output


@pytest.mark.parametrize(
    ("direct_url", "origin"),
    [
        ({"url": "file:///home/me/my%20code", "dir_info": {"editable": True}}, ["--editable", "/home/me/my code"]),
        ({"url": "file:///home/me/code", "dir_info": {}}, ["/home/me/code"]),
        ({"url": "file:///tmp/e.whl", "archive_info": {}}, ["--no-cache-dir", "--no-binary", "ernie45", "ernie45"]),
        (None, ["--no-cache-dir", "--no-binary", "ernie45", "ernie45"]),
    ],
)
def test_it_is_installed_again_from_where_it_came(
    direct_url: object, origin: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "ernie45-0.1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Name: ernie45\nVersion: 0.1.0\n", encoding="utf-8")
    if direct_url is not None:
        (folder / "direct_url.json").write_text(json.dumps(direct_url), encoding="utf-8")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert doctor._origin() == origin


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch finds the GPU of this machine")
def test_a_driver_that_torch_was_not_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "has_cuda_driver", lambda: True)
    found = diagnose()
    assert found.gpus == ()
    assert f"torch finds no GPU: torch {torch.__version__} is a build" in found.advice[-1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine")
def test_gpus_are_named() -> None:
    assert torch.cuda.get_device_name(0) in diagnose().gpus[0]


def test_the_cache_need_not_be_there_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "not" / "there"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    found = diagnose()
    assert found.hub_cache == str(cache)
    assert found.free_disk_bytes > 0
    assert not cache.parent.exists()


def test_the_processor_has_a_name(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel\t\t: 17\nmodel name\t: AMD EPYC: 9654\n\nprocessor\t: 1\n")
    assert doctor._processor(cpuinfo) == "AMD EPYC: 9654"
    cpuinfo.write_text("Features\t: fp asimd\n")
    assert doctor._processor(cpuinfo)
    assert doctor._processor(tmp_path / "none")
