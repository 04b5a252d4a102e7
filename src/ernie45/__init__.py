"""Run ERNIE 4.5 models from Python. `ErnieModel.from_pretrained` is where to start.

Importing this package loads no torch: the names below arrive when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ernie45.errors import (
    AccessDeniedError,
    CheckpointError,
    ConfigError,
    ContextLengthError,
    CorruptFileError,
    ErnieError,
    HubUnreachableError,
    InvalidRequestError,
    MediaError,
    ModelClosedError,
    ModelNotFoundError,
    OutOfMemoryError,
    TemplateError,
    TensorError,
    TokenizerError,
    UnsupportedError,
)

__version__ = "0.1.0"

__all__ = [
    "AccessDeniedError",
    "ChatChunk",
    "ChatCompletion",
    "CheckpointError",
    "Completion",
    "CompletionChunk",
    "ConfigError",
    "ContextLengthError",
    "CorruptFileError",
    "ErnieError",
    "ErnieModel",
    "HubUnreachableError",
    "InvalidRequestError",
    "MediaError",
    "MediaLimits",
    "MediaPreview",
    "MemoryPlan",
    "Message",
    "ModelClosedError",
    "ModelInfo",
    "ModelNotFoundError",
    "OutOfMemoryError",
    "Prompt",
    "QuantPreset",
    "RoutingTrace",
    "SamplingOptions",
    "Score",
    "TemplateError",
    "TensorError",
    "TokenLogprob",
    "TokenizerError",
    "UnsupportedError",
    "Usage",
    "__version__",
    "list_models",
    "plan_memory",
]

if TYPE_CHECKING:
    from ernie45 import backends as backends
    from ernie45 import testing as testing
    from ernie45.catalogue import ModelInfo, list_models
    from ernie45.experts.trace import RoutingTrace
    from ernie45.memory.plan import MemoryPlan
    from ernie45.model import ErnieModel
    from ernie45.planning import plan_memory
    from ernie45.presets import QuantPreset
    from ernie45.types.limits import MediaLimits
    from ernie45.types.messages import Message
    from ernie45.types.previews import MediaPreview
    from ernie45.types.prompts import Prompt
    from ernie45.types.requests import SamplingOptions
    from ernie45.types.results import (
        ChatChunk,
        ChatCompletion,
        Completion,
        CompletionChunk,
        Score,
        TokenLogprob,
        Usage,
    )
else:
    # Hidden from type checkers: a module-level __getattr__ would make them accept any misspelt name.
    _HOMES = {
        "ErnieModel": "ernie45.model",
        "MediaLimits": "ernie45.types.limits",
        "MediaPreview": "ernie45.types.previews",
        "MemoryPlan": "ernie45.memory.plan",
        "Message": "ernie45.types.messages",
        "ModelInfo": "ernie45.catalogue",
        "Prompt": "ernie45.types.prompts",
        "QuantPreset": "ernie45.presets",
        "RoutingTrace": "ernie45.experts.trace",
        "SamplingOptions": "ernie45.types.requests",
        "ChatChunk": "ernie45.types.results",
        "ChatCompletion": "ernie45.types.results",
        "Completion": "ernie45.types.results",
        "CompletionChunk": "ernie45.types.results",
        "Score": "ernie45.types.results",
        "TokenLogprob": "ernie45.types.results",
        "Usage": "ernie45.types.results",
        "list_models": "ernie45.catalogue",
        "plan_memory": "ernie45.planning",
    }

    _PACKAGES = ("backends", "testing")

    def __getattr__(name):
        if name in _PACKAGES:
            return import_module(f"{__name__}.{name}")
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(_HOMES[name]), name)
        return value


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
