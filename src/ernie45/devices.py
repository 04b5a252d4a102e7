"""What this machine has: devices, the arithmetic they can do, and their free memory."""

from __future__ import annotations

import psutil
import torch

from ernie45.errors import UnsupportedError
from ernie45.spec import DTYPE_NAMES, DtypeName

_TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    """Memory that can still be taken on `device`, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _has_arithmetic(dtype: DtypeName, device: torch.device) -> bool:
    if dtype == "float32" or device.type == "mps":
        return True
    if device.type == "cuda":
        return dtype == "float16" or torch.cuda.is_bf16_supported()
    if dtype != "bfloat16" or not torch.backends.mkldnn.is_available():
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
