"""One step of a model: token ids and KV slots in, logits out. Nothing here knows of requests, text or sampling.

Another package adds an architecture with `register`; what its backend needs is here and in `ernie45.spec`.
"""

from ernie45.backends.base import Backend, Batch, BuildOptions, MediaBackend, PrefixBackend, Row, Step, VisionTokens
from ernie45.backends.kv_cache import KVCache
from ernie45.backends.registry import Architecture, BuildBackend, register
from ernie45.checkpoint.read import TensorSource

__all__ = [
    "Architecture",
    "Backend",
    "Batch",
    "BuildBackend",
    "BuildOptions",
    "KVCache",
    "MediaBackend",
    "PrefixBackend",
    "Row",
    "Step",
    "TensorSource",
    "VisionTokens",
    "register",
]
