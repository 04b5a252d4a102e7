"""Every error ernie45 raises on purpose. A traceback of any other class is a bug in ernie45.

ErnieError
├── InvalidRequestError        a call was given something it cannot use (also a ValueError)
│   ├── ContextLengthError     prompt + reply do not fit the context
│   ├── MediaError             a picture or clip cannot be read or fetched, or is beyond a limit
│   └── TemplateError          a chat template failed, refused the messages, or ran too long
├── CheckpointError            a checkpoint cannot be loaded
│   ├── ModelNotFoundError     no such folder, built-in model or Hub repository
│   ├── AccessDeniedError      the Hub wants a (different) token
│   ├── HubUnreachableError    the Hub does not answer, or is not to be asked
│   ├── ConfigError            config.json cannot be read, or asks for what we do not compute
│   ├── CorruptFileError       a weight file is cut short or not what it says
│   ├── TensorError            a tensor or shard is missing, unexpected, or of another shape
│   └── TokenizerError         tokenizer files are missing or broken
├── OutOfMemoryError           what was asked for does not fit the memory there is
├── UnsupportedError           a device, dtype or option this machine or version cannot serve
└── ModelClosedError           the model was used after close()
"""

from __future__ import annotations


class ErnieError(Exception):
    """Base class. `message` says what failed, with the number or name; `hint` says what to do next."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  -> {self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message, self.hint)


def _rebuild(cls: type[ErnieError], message: str, hint: str) -> ErnieError:
    return cls(message, hint=hint)


class InvalidRequestError(ErnieError, ValueError):
    """A call was given something it cannot use."""


class ContextLengthError(InvalidRequestError):
    """Prompt and reply together are longer than the context."""


class MediaError(InvalidRequestError):
    """A picture or clip cannot be read or fetched, or is larger than a limit allows."""


class TemplateError(InvalidRequestError):
    """A chat template failed, refused the messages, or ran past its limits."""


class CheckpointError(ErnieError):
    """A checkpoint cannot be loaded."""


class ModelNotFoundError(CheckpointError):
    """No such folder, built-in model or Hub repository."""


class AccessDeniedError(CheckpointError):
    """The Hub refuses access: no token, or one without the right."""


class HubUnreachableError(CheckpointError):
    """The Hub does not answer, or network use was ruled out and the files are not cached."""


class ConfigError(CheckpointError):
    """config.json cannot be read, or asks for something ernie45 does not compute."""


class CorruptFileError(CheckpointError):
    """A weight file is cut short, or its header contradicts its content."""


class TensorError(CheckpointError):
    """A tensor or shard is missing, unexpected, or has another shape than the config says."""


class TokenizerError(CheckpointError):
    """Tokenizer files are missing or broken."""


class OutOfMemoryError(ErnieError):
    """What was asked for does not fit the memory there is."""


class UnsupportedError(ErnieError):
    """A device, dtype or option that this machine or this version cannot serve."""


class ModelClosedError(ErnieError):
    """The model was used after close()."""
