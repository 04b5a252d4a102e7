"""What huggingface_hub raises, told as our errors with what to do next."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)

from ernie45.catalogue import did_you_mean
from ernie45.errors import AccessDeniedError, CheckpointError, HubUnreachableError, ModelNotFoundError


@contextmanager
def translated_errors(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn what the Hub, the network or the disk refuse inside the block into one of our errors."""
    try:
        yield
    except HFValidationError as error:
        hint = did_you_mean(repo_id) or 'a Hub id reads "org/name", in letters, digits, ".", "_" and "-"'
        raise ModelNotFoundError(f"{repo_id!r} is neither a folder nor a Hub id", hint=hint) from error
    except json.JSONDecodeError as error:
        raise HubUnreachableError(
            f"{constants.ENDPOINT} does not answer like a Hub",
            hint="check HF_ENDPOINT, and whether a proxy or log-in page stands between",
        ) from error
    except (OSError, HTTPError) as error:
        raise _translate(error, repo_id, revision) from error


def _translate(error: Exception, repo_id: str, revision: str | None) -> CheckpointError:
    # huggingface_hub wraps a failure in "not in the cache either" and keeps it as the cause.
    causes = [error]
    while isinstance(causes[-1].__cause__, Exception):
        causes.append(causes[-1].__cause__)

    for cause in causes:
        if isinstance(cause, HfHubHTTPError):
            return _translate_answer(cause, repo_id, revision)
        if isinstance(cause, OfflineModeIsEnabled):
            return HubUnreachableError(
                f"{repo_id} is not (wholly) in the cache, and HF_HUB_OFFLINE rules out asking the Hub",
                hint="unset HF_HUB_OFFLINE, or give the folder of a local copy",
            )
        if isinstance(cause, HTTPError):
            return HubUnreachableError(
                f"{constants.ENDPOINT} cannot be reached for {repo_id}: {cause}",
                hint="check the network and HF_ENDPOINT; loading again goes on where it stopped",
            )
    if isinstance(error, LocalEntryNotFoundError):
        return HubUnreachableError(
            f"{repo_id} is not (wholly) in the cache",
            hint="load it once with local_files_only=False, check cache_dir=, or give a folder",
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CheckpointError(
            f"the disk is full: {repo_id} could not be stored ({error})",
            hint="free some space or give cache_dir= on a larger disk, then load again: the download goes on",
        )
    return CheckpointError(f"{repo_id} could not be stored: {error}", hint="check cache_dir= and its rights")


def _translate_answer(answer: HfHubHTTPError, repo_id: str, revision: str | None) -> CheckpointError:
    status = answer.response.status_code
    if isinstance(answer, RevisionNotFoundError):
        return ModelNotFoundError(
            f"{repo_id} has no revision {revision!r}",
            hint="leave revision= out, or give a branch, tag or commit",
        )
    if status in (401, 403):
        return AccessDeniedError(
            f"the Hub refuses access to {repo_id} (HTTP {status}): it is private, gated or does not exist",
            hint=did_you_mean(repo_id)
            or f"accept its terms at {constants.ENDPOINT}/{repo_id}, then give token= or run `hf auth login`",
        )
    if status == 404:
        at = f" at revision {revision!r}" if revision else ""
        return ModelNotFoundError(
            f"{constants.ENDPOINT} has no model {repo_id}{at}",
            hint=did_you_mean(repo_id) or "check the spelling",
        )
    return HubUnreachableError(
        f"{constants.ENDPOINT} answered HTTP {status} for {repo_id}",
        hint="try again later: the download goes on",
    )
