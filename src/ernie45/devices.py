"""What this machine has: devices, the arithmetic they can do, and their free memory."""

from __future__ import annotations

import functools
import time
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F

from ernie45.errors import UnsupportedError
from ernie45.memory.machine import host_bytes
from ernie45.spec import DTYPE_NAMES, DtypeName

_TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_MEASURED_OPERATIONS = 10**9  # of one product: a few hundredths of a second on a slow CPU
_MEASURED_ROWS = (32, 2048)  # at least and at most
_MEASURED_SECONDS = 0.05


def choose_device(name: str) -> torch.device:
    """ "auto" takes the first of CUDA, MPS and CPU that is there; other names are torch's ("cpu", "cuda:1", "mps").

    Raises:
        UnsupportedError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise UnsupportedError(
            f"device {name!r} is not a device name", hint="use 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'"
        ) from None
    present = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not present.get(device.type, False):
        raise UnsupportedError(f"device {name!r} is not available on this machine", hint="use device='auto' or 'cpu'")
    return device


def check_dtype_name(name: str) -> None:
    """Raises UnsupportedError for what `choose_dtype` does not know."""
    if name != "auto" and name not in DTYPE_NAMES:
        raise UnsupportedError(f"dtype {name!r} is unknown", hint=f"use 'auto', {', '.join(map(repr, DTYPE_NAMES))}")


def choose_dtype(name: str, *, checkpoint: DtypeName, device: torch.device) -> torch.dtype:
    """ "auto" is the checkpoint's dtype, or float32 where the device has no fast arithmetic in it.

    Raises:
        UnsupportedError: an unknown dtype name.
    """
    if name == "auto":
        return _TORCH_DTYPES[checkpoint] if _has_arithmetic(checkpoint, device) else torch.float32
    check_dtype_name(name)
    return _TORCH_DTYPES[name]


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken on `device`, in bytes; on the CPU within this process's cgroups."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return max(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory(), 0)
    return host_bytes().available_bytes


@functools.cache
def product_rate(device: str, dtype: str, *, in_features: int, out_features: int) -> float:
    """Floating-point operations per second of a product [32 to 2048, in] · [in, out] on a device, as measured now.

    The first call takes a few tenths of a second; later ones with the same arguments give the same number at once.
    """
    # On a thread that ends with it: the caller's would keep a team of OpenMP workers beside the engine's.
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="ernie45-measuring") as pool:
        return pool.submit(
            _measure_rate, torch.device(device), _TORCH_DTYPES[dtype], in_features, out_features
        ).result()


@torch.inference_mode()
def _measure_rate(device: torch.device, dtype: torch.dtype, in_features: int, out_features: int) -> float:
    least, most = _MEASURED_ROWS
    num_rows = min(max(least, _MEASURED_OPERATIONS // (2 * in_features * out_features)), most)
    rows = torch.ones(num_rows, in_features, dtype=dtype, device=device)
    weight = torch.ones(out_features, in_features, dtype=dtype, device=device)
    _finish(F.linear(rows, weight))  # the first one sets things up
    num_products = 0
    started = time.perf_counter()
    while (seconds := time.perf_counter() - started) < _MEASURED_SECONDS:
        _finish(F.linear(rows, weight))
        num_products += 1
    return 2 * num_rows * in_features * out_features * num_products / seconds


def _finish(product: torch.Tensor) -> None:
    """Wait until it is computed: a GPU works on while Python goes ahead."""
    product[0, 0].item()


def _has_arithmetic(dtype: DtypeName, device: torch.device) -> bool:
    if dtype == "float32" or device.type == "mps":
        return True
    if device.type == "cuda":
        return dtype == "float16" or torch.cuda.is_bf16_supported()
    if dtype != "bfloat16" or not torch.backends.mkldnn.is_available():
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
