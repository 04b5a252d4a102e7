"""`ernie45 doctor`: what this installation and this machine have, and what to do about what is missing."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit
from urllib.request import url2pathname

import psutil

from ernie45 import __version__
from ernie45.kernels.library import instruction_set, instruction_sets, why_not
from ernie45.memory.budget import in_words
from ernie45.memory.machine import has_cuda_driver, host_bytes

_LABEL_WIDTH: Final = 14
_WIDTH: Final = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """What was found. Sizes are in bytes.

    `instruction_set` is what the native kernels use and `instruction_sets` what they could use here, best first; where
    there are none `why_no_kernels` says why. `num_cpus` counts hardware threads. `memory_limit_bytes` is a cgroup's.
    `advice` is what would help, each a few sentences, and maybe a command on a line of its own.
    """

    ernie45: str
    python: str
    torch: str | None
    transformers: str | None
    system: str
    processor: str
    num_cores: int
    num_cpus: int
    num_usable_cpus: int
    instruction_set: str | None
    instruction_sets: tuple[str, ...]
    why_no_kernels: str | None
    memory_bytes: int
    available_memory_bytes: int
    memory_limit_bytes: int | None
    gpus: tuple[str, ...]
    hub_cache: str
    free_disk_bytes: int
    advice: tuple[str, ...]

    def to_json(self) -> str:
        """All fields by their names."""
        return json.dumps(asdict(self), ensure_ascii=False, indent=2)

    def __str__(self) -> str:
        lines = [line for label, text in self._rows() for line in _labelled(label, text)]
        for number, advice in enumerate(self.advice, start=1):
            lines += _labelled("To do" if number == 1 else "", advice)
        return "\n".join(lines)

    def _rows(self) -> Iterator[tuple[str, str]]:
        yield "ernie45", self.ernie45
        yield "Python", self.python
        yield "torch", self.torch or "not installed"
        yield "transformers", self.transformers or "not installed"
        yield "System", self.system
        threads = "" if self.num_cpus == self.num_cores else f", {self.num_cpus} hardware threads"
        usable = "" if self.num_usable_cpus == self.num_cpus else f", {self.num_usable_cpus} of which may be used"
        yield "Processor", f"{self.processor}, {self.num_cores} cores{threads}{usable}"
        if self.instruction_set is None:
            yield "Kernels", f"torch's, not native: {self.why_no_kernels}"
        else:
            others = [name for name in self.instruction_sets if name != self.instruction_set]
            yield "Kernels", f"native, {self.instruction_set}" + (f" (also {', '.join(others)})" if others else "")
        limit = "" if self.memory_limit_bytes is None else f"; a cgroup allows {in_words(self.memory_limit_bytes)}"
        yield "Memory", f"{in_words(self.available_memory_bytes)} free of {in_words(self.memory_bytes)}{limit}"
        yield "GPUs", ", ".join(self.gpus) or "none"
        yield "Hub cache", f"{self.hub_cache}, {in_words(self.free_disk_bytes)} free"


def diagnose() -> Diagnosis:
    """Look at the installation and the machine; torch is imported only where there may be a GPU."""
    memory = host_bytes()
    gpus, gpu_advice = _gpus()
    hub_cache, free_disk_bytes = _hub_cache()
    num_cpus = os.cpu_count() or 1
    no_kernels = why_not()
    return Diagnosis(
        ernie45=__version__,
        python=platform.python_version(),
        torch=_version("torch"),
        transformers=_version("transformers"),
        system=f"{platform.system()} {platform.machine()}",
        processor=_processor(),
        num_cores=psutil.cpu_count(logical=False) or num_cpus,
        num_cpus=num_cpus,
        num_usable_cpus=len(os.sched_getaffinity(0)) if sys.platform == "linux" else num_cpus,
        instruction_set=instruction_set(),
        instruction_sets=instruction_sets(),
        why_no_kernels=no_kernels,
        memory_bytes=memory.total_bytes,
        available_memory_bytes=memory.available_bytes,
        memory_limit_bytes=memory.limit_bytes,
        gpus=gpus,
        hub_cache=str(hub_cache),
        free_disk_bytes=free_disk_bytes,
        advice=(*(() if no_kernels is None else (_kernel_advice(),)), *gpu_advice),
    )


def _kernel_advice() -> str:
    return (
        "Without native kernels a CPU is slower, most of all in int8 and int4, whose replies may then differ at "
        "near-ties with what runs beside them. The kernels are compiled when ernie45 is installed. Have a C compiler, "
        "gcc 10 or clang 9 or newer (apt install gcc libc6-dev; dnf install gcc; xcode-select --install), and install "
        "it again:\n"
        f"{shlex.join([sys.executable, '-m', 'pip', 'install', '--force-reinstall', '--no-deps', *_origin()])}"
    )


def _origin() -> list[str]:
    """What to give pip to build this package again from where it came: its folder, or its name."""
    try:
        direct = json.loads(metadata.distribution("ernie45").read_text("direct_url.json") or "{}")
    except metadata.PackageNotFoundError:  # run from its sources
        direct = {}
    if "dir_info" in direct:
        folder = url2pathname(urlsplit(direct["url"]).path)
        return ["--editable", folder] if direct["dir_info"].get("editable") else [folder]
    # pip would take a finished wheel, or the one without kernels that it built and kept the last time.
    return ["--no-cache-dir", "--no-binary", "ernie45", "ernie45"]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name, as Linux or macOS has it; else what kind it is."""
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return platform.processor() or platform.machine()


def _gpus() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """GPUs that torch can use, and what to do where there is one that it cannot use."""
    if not has_cuda_driver() and sys.platform != "darwin":
        return (), ()
    try:
        import torch  # here, because it takes seconds
    except (ImportError, OSError) as error:
        return (), (f"torch cannot be imported ({error}): install it once more.",)
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        return tuple(f"{device.name} with {in_words(device.total_memory)}" for device in devices), ()
    if torch.backends.mps.is_available():
        return ("Apple's, through MPS",), ()
    if not has_cuda_driver():
        return (), ()
    build = "is a build without CUDA" if torch.version.cuda is None else f"is built for CUDA {torch.version.cuda}"
    return (), (
        f"There is an NVIDIA driver, but torch finds no GPU: torch {torch.__version__} {build}. Install a build for "
        "this driver's CUDA: https://pytorch.org/get-started/locally/",
    )


def _hub_cache() -> tuple[Path, int]:
    """Where downloads go, and the bytes free there."""
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = Path(HF_HUB_CACHE)
    there = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    return cache, shutil.disk_usage(there).free


def _labelled(label: str, text: str) -> list[str]:
    """Lines of at most 100 columns, the label before the first; what follows a line break is a command, left whole."""
    indent = " " * _LABEL_WIDTH
    sentences, *commands = text.split("\n")
    lines = textwrap.wrap(
        sentences,
        _WIDTH,
        initial_indent=indent,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    )
    return [
        label.ljust(_LABEL_WIDTH) + lines[0][_LABEL_WIDTH:],
        *lines[1:],
        *(f"{indent}  {line}" for line in commands),
    ]
