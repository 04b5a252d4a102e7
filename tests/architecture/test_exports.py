"""The public names, written out once more, so that none comes or goes unnoticed."""

from __future__ import annotations

import pytest

import ernie45

PUBLIC_NAMES = [
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


def test_all_is_the_public_surface_in_order() -> None:
    assert ernie45.__all__ == PUBLIC_NAMES
    assert sorted(PUBLIC_NAMES) == PUBLIC_NAMES


@pytest.mark.parametrize("name", PUBLIC_NAMES)
def test_every_public_name_resolves(name: str) -> None:
    value = getattr(ernie45, name)
    assert name == "__version__" or value.__name__ == name


def test_dir_lists_the_public_names_and_nothing_private() -> None:
    assert {name for name in dir(ernie45) if not name.startswith("__")} == set(PUBLIC_NAMES) - {"__version__"}
    assert {"__version__", "__doc__", "__all__"} <= set(dir(ernie45))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'ErnieModle'"):
        _ = ernie45.ErnieModle  # type: ignore[attr-defined]
