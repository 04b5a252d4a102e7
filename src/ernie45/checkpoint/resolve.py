"""From what a caller names to a folder on this machine."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from ernie45 import catalogue
from ernie45.checkpoint.quantized_releases import refuse_by_name
from ernie45.errors import CheckpointError, InvalidRequestError, ModelNotFoundError


def resolve(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    token: str | None = None,
    progress: bool = True,
    check: Callable[[Path], object] = lambda folder: None,
) -> Path:
    """Find the folder of a checkpoint, downloading it from the Hub where need be.

    An existing folder, a `Path`, and a string that starts like a path (/, ./, ../, ~) are used as they are,
    without network. Then come built-in and catalogue names, with or without their organisation, in any case;
    any other "org/name" is a Hub id, and only there do the other parameters count. Files in the cache are not
    fetched again, and a download that broke off goes on where it stopped.

    Raises ModelNotFoundError, AccessDeniedError or HubUnreachableError, CorruptFileError for a file that came
    damaged, CheckpointError when a folder cannot be read, the disk is full or there are no safetensors weights,
    and UnsupportedError for a quantised Paddle release.
    """
    folder = named_folder(name_or_path)
    if folder is not None:
        return folder
    name = str(name_or_path).strip()
    entry = catalogue.find(name)
    if entry is not None and entry.built_in:
        return _existing_folder(catalogue.built_in_folder(entry))
    repo_id = entry.name if entry is not None else name
    if repo_id.count("/") != 1:
        raise ModelNotFoundError(
            f"there is no folder and no known model {name!r:.200}",
            hint=catalogue.did_you_mean(name) or 'a Hub id reads "org/name"',
        )

    refuse_by_name(repo_id)
    # Imported here because huggingface_hub takes a while to import and local folders do not need it.
    from ernie45.checkpoint.hub import fetch_checkpoint

    return fetch_checkpoint(
        repo_id,
        revision=revision,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        token=token,
        progress=progress,
        check=check,
    )


def named_folder(name_or_path: str | os.PathLike[str]) -> Path | None:
    """The folder that a caller names, as `resolve` explains; None where it is a built-in, catalogue or Hub name.

    Raises:
        InvalidRequestError: neither text nor a path, or empty.
        ModelNotFoundError: there is no such folder.
        CheckpointError: it cannot be read.
    """
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise InvalidRequestError(
            f"a model is named by text or a path, not {type(name_or_path).__name__}", hint='e.g. "ernie45/tiny-dense"'
        )
    if not isinstance(name_or_path, str):
        return _existing_folder(Path(name_or_path))
    name = name_or_path.strip()
    if not name:
        raise InvalidRequestError("the model name is empty", hint='e.g. "ernie45/tiny-dense"')
    if _looks_like_path(name) or os.path.isdir(name):
        return _existing_folder(Path(name))
    return None


def _looks_like_path(name: str) -> bool:
    return Path(name).is_absolute() or name in (".", "..") or name.startswith(("./", "../", "~"))


def _existing_folder(path: Path) -> Path:
    path = Path(os.path.expanduser(path))  # unlike Path.expanduser, it leaves the home of nobody as it is
    try:
        os.scandir(path).close()
    except PermissionError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}", hint="check the folder's permissions") from error
    except (OSError, ValueError):  # ValueError: what no path can hold
        if os.path.isfile(path):
            raise ModelNotFoundError(
                f"{path} is a file, not a folder", hint=f"give its folder: {path.parent}"
            ) from None
        raise ModelNotFoundError(
            f"there is no folder {str(path)!r:.200}", hint='check the spelling; a Hub id reads "org/name"'
        ) from None
    return path
