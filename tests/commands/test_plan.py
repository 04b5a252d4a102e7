from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ernie45 import plan_memory
from ernie45.cli import main
from ernie45.commands.plan import memory_limit
from ernie45.errors import InvalidRequestError
from ernie45.experts.trace import RoutingTrace
from ernie45.memory.machine import HostMemory

IN_A_NEW_PROCESS = """
import sys
from pathlib import Path
from ernie45.cli import main
status = main(sys.argv[1:])
print(status, [name for name in ("torch", "transformers", "huggingface_hub") if name in sys.modules], file=sys.stderr)
"""


@pytest.mark.parametrize("name", ["baidu/ERNIE-4.5-300B-A47B-PT", "ernie45/tiny-vl"])
def test_a_name_is_planned_without_torch(name: str) -> None:
    command = [sys.executable, "-c", IN_A_NEW_PROCESS, "plan", name, "--memory", "24GiB", "--device", "cpu"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.startswith(name)
    assert run.stderr == "0 []\n"


def test_the_table_is_the_plans(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--quantization", "int4", "--memory", "24GiB", "--device", "cpu", "--dtype", "bfloat16"]
    assert main(["plan", "ERNIE-4.5-300B-A47B-PT", *arguments, "--context", "8192", "--batch", "1"]) == 0
    plan = plan_memory(
        "ERNIE-4.5-300B-A47B-PT",
        quantization="int4",
        memory="24GiB",
        device="cpu",
        dtype="bfloat16",
        context_tokens=8192,
        max_batch=1,
    )
    assert capsys.readouterr() == (f"{plan.explain()}\n", "")
    assert plan.verdict == "streams"


def test_json_has_all_that_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--memory", "cpu=24GiB", "--memory", "cuda:0=20GiB", "--memory", "disk=50GB"]
    options = ["--quantization", "none", "--dtype", "float16", "--kv-dtype", "int8", "--context", "1000"]
    assert main(["plan", "ERNIE-4.5-300B-A47B-PT", *sizes, *options, "--batch", "2", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["preset"], values["dtype"], values["kv_dtype"]) == ("none", "float16", "int8")
    assert (values["context_tokens"], values["max_batch"], values["verdict"]) == (1000, 2, "does not fit")
    assert values["free_disk_bytes"] == 50 * 10**9
    assert {device["device"]: device["capacity_bytes"] for device in values["devices"]} == {
        "cuda:0": 20 * 2**30,
        "cpu": 24 * 2**30,
    }


def test_a_draft_is_part_of_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    drafts = []
    for options in ([], ["--draft", "mtp"]):
        assert main(["plan", "ernie45/tiny-moe", "--device", "cpu", "--memory", "1GiB", "--json", *options]) == 0
        drafts.append(json.loads(capsys.readouterr().out)["part_bytes"]["draft"])
    assert drafts[0] == 0 < drafts[1]


def test_a_trace_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = RoutingTrace(
        num_experts=64,
        calls=np.array([(layer, 0, 1) for _ in range(4) for layer in range(1, 28)], np.int32),
        chosen=np.tile(np.arange(6, dtype=np.uint8), (4 * 27, 1)),
    )
    trace.save(tmp_path / "trace.npz")
    options = ["--quantization", "int4", "--memory", "6GiB", "--device", "cpu", "--dtype", "bfloat16", "--json"]
    assert main(["plan", "ERNIE-4.5-21B-A3B-PT", *options, "--routing", str(tmp_path / "trace.npz")]) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["routing_tokens"], values["expert_hit_rate"]) == (4, 0.75)


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["ERNIE-4.5-0.3B-TP"], "did you mean 'baidu/ERNIE-4.5-0.3B-PT'"),
        (["ernie45/tiny-dense", "--quantization", "int3"], "quantization='int3' is unknown"),
        (["ernie45/tiny-dense", "--memory", "much"], "'much' is not a memory size"),
        (["ernie45/tiny-dense", "--memory", "tpu=1GiB"], "'tpu'"),
        (["ernie45/tiny-dense", "--memory", "1GiB", "--memory", "cpu=2GiB"], "names 'cpu' twice"),
        (["ernie45/tiny-dense", "--kv-dtype", "int2"], "kv_dtype='int2'"),
        (["ernie45/tiny-dense", "--context", "0"], "context_tokens must be from 1"),
        (["ernie45/tiny-dense", "--batch", "0"], "max_batch must be"),
        (["ernie45/tiny-dense", "--draft", "mtp"], "draft='mtp' was asked for"),
        (["ernie45/tiny-moe", "--routing", "none.npz"], "there is no file none.npz"),
    ],
)
def test_mistakes_are_explained(arguments: list[str], shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert shown in err


def test_what_memory_means() -> None:
    assert memory_limit(None) is None
    assert memory_limit(["24GiB"]) == {"cpu": "24GiB"}
    assert memory_limit(["cuda:0=20GiB", "24GiB", "disk=50GB"]) == {"cuda:0": "20GiB", "cpu": "24GiB", "disk": "50GB"}
    with pytest.raises(InvalidRequestError, match="'disk' twice"):
        memory_limit(["disk=1GB", "disk=2GB"])


def test_the_guide_shows_what_the_command_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = HostMemory(total_bytes=64 * 2**30, available_bytes=2**30, limited_by="machine", limit_bytes=None)
    monkeypatch.setattr("ernie45.planning.host_bytes", lambda: machine)
    monkeypatch.setattr("ernie45.memory.bandwidth.copy_rate", lambda: 40e9)
    monkeypatch.setattr("ernie45.planning.native_library", object)  # as where there are native kernels
    page = (Path(__file__).resolve().parents[2] / "docs" / "guide" / "memory.md").read_text(encoding="utf-8")
    examples = re.findall(r"```console\n\$ ernie45 (plan .*)\n((?s:.*?))```", page)
    assert len(examples) == 3
    for command, shown in examples:
        assert main(command.split()) == 0
        assert capsys.readouterr().out == shown


def test_the_guide_lists_every_key() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "guide" / "memory.md").read_text(encoding="utf-8")
    table = page.partition("| key |")[2].partition("\n\n")[0]
    values = plan_memory("ernie45/tiny-dense", memory="1GiB", device="cpu").to_dict()
    named = {*values, *values["part_bytes"], *values["devices"][0], *values["placement"]}
    assert named == set(re.findall(r"`(\w+)`", table))
