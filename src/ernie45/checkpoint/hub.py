"""Checkpoints on the Hugging Face Hub: the files that are needed, fetched into huggingface_hub's own cache.

huggingface_hub keeps the cache and fetches the small files. Weight files are put into that cache from here,
because huggingface_hub drops a partly fetched file when a call ends, and these files are gigabytes large.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import WeakFileLock, build_hf_headers  # type: ignore[attr-defined]
from huggingface_hub.utils import tqdm as hub_tqdm  # type: ignore[attr-defined]

from ernie45.checkpoint.download import Blob, download
from ernie45.checkpoint.headers import INDEX_FILE, SINGLE_FILE, read_weight_map
from ernie45.checkpoint.hub_errors import translated_errors
from ernie45.checkpoint.progress import Advance, byte_progress
from ernie45.errors import CheckpointError, HubUnreachableError

SMALL_FILES: Final = (
    "config.json",
    "quantize_config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "Roboto-Regular.ttf",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    INDEX_FILE,
)
PARALLEL_DOWNLOADS: Final = 8
_BLOB_NAME = re.compile(r"\w[\w.-]*")


def fetch_checkpoint(
    repo_id: str,
    *,
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
    token: str | None,
    progress: bool,
    check: Callable[[Path], object],
) -> Path:
    """Bring a checkpoint's configuration, tokenizer and weights into the cache; returns the snapshot folder.

    `check` is called with it once the small files are there, and may refuse it before gigabytes are fetched.

    When the Hub cannot be asked, a complete snapshot in the cache serves. Weight files that broke off go on
    where they stopped. Raises ModelNotFoundError, AccessDeniedError, HubUnreachableError, CheckpointError or
    CorruptFileError.
    """
    with translated_errors(repo_id, revision):
        snapshot = Path(
            snapshot_download(
                repo_id,
                revision=revision,
                cache_dir=None if cache_dir is None else Path(cache_dir),
                local_files_only=local_files_only,
                token=token,
                allow_patterns=list(SMALL_FILES),
                tqdm_class=_NoBar,
            )
        )
        check(snapshot)
        weight_map = read_weight_map(snapshot)
        names = [SINGLE_FILE] if weight_map is None else sorted(set(weight_map.values()))
        missing = [name for name in names if not (snapshot / name).exists()]
        if missing and local_files_only:
            raise HubUnreachableError(
                f"the cache lacks {len(missing)} of {len(names)} weight files of {repo_id}: {missing[0]} …",
                hint="load it once with local_files_only=False; what is there already is not fetched again",
            )
        if missing:
            _Weights(repo_id=repo_id, snapshot=snapshot, token=token).fetch(missing, progress=progress)
    return snapshot


@final
class _NoBar(hub_tqdm):
    """The progress bar of the small files, which nobody needs to see."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"disable": True})  # type: ignore[no-untyped-call]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Weights:
    """Weight files of one snapshot, which lies at `<cache>/models--org--name/snapshots/<commit>`."""

    repo_id: str
    snapshot: Path
    token: str | None

    def fetch(self, names: Sequence[str], *, progress: bool) -> None:
        stopping = threading.Event()
        with ThreadPoolExecutor(PARALLEL_DOWNLOADS) as pool:
            blobs = dict(zip(names, pool.map(self._locate, names), strict=True))
            to_fetch = [blob for blob in blobs.values() if blob is not None and not blob.path.exists()]
            self._check_disk_space(to_fetch)
            total_bytes = sum(blob.num_bytes for blob in to_fetch)
            with byte_progress(f"Downloading {self.repo_id}", total_bytes, show=progress) as advance:
                futures = [pool.submit(self._fetch_file, name, blob, advance, stopping) for name, blob in blobs.items()]
                try:
                    for future in as_completed(futures):
                        future.result()
                except BaseException:
                    # One failure, or Ctrl-C, must not wait for gigabytes that other threads are fetching.
                    stopping.set()
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise

    def _locate(self, name: str) -> Blob | None:
        """Ask where a file is; None when only huggingface_hub can fetch it."""
        url = hf_hub_url(self.repo_id, name, revision=self.snapshot.name)
        try:
            found = get_hf_file_metadata(url, token=self.token)
        except HfHubHTTPError as error:
            if error.response.status_code != 404:
                raise
            raise CheckpointError(
                f"{self.repo_id} has no {name} on the Hub",
                hint="only safetensors weights are loaded, never pickles such as .bin, .pt or .pdparams",
            ) from error
        if not found.etag or not _BLOB_NAME.fullmatch(found.etag) or found.size is None:
            return None
        if found.size > constants.MAX_HTTP_DOWNLOAD_SIZE:
            return None
        return Blob(url=url, path=self._model_folder / "blobs" / found.etag, num_bytes=found.size)

    def _fetch_file(self, name: str, blob: Blob | None, advance: Advance, stopping: threading.Event) -> None:
        if blob is not None:
            # The lock that huggingface_hub takes for this file, so that no two processes write it.
            lock = self._model_folder.parent / ".locks" / self._model_folder.name / f"{blob.path.name}.lock"
            lock.parent.mkdir(parents=True, exist_ok=True)
            with WeakFileLock(lock):
                if not blob.path.exists():
                    download(blob, build_hf_headers(token=self.token), advance, stopping)
        if stopping.is_set():
            return
        # Links the blob into the snapshot.
        hf_hub_download(
            self.repo_id,
            name,
            revision=self.snapshot.name,
            cache_dir=self._model_folder.parent,
            token=self.token,
        )

    def _check_disk_space(self, blobs: Sequence[Blob]) -> None:
        needed = sum(blob.num_bytes - blob.partial_bytes for blob in blobs)
        folder = self._model_folder / "blobs"
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise CheckpointError(
                f"downloading {self.repo_id} needs {needed:,} bytes, but {folder} has room for {free:,}",
                hint="free some space, or give cache_dir= on a larger disk",
            )

    @property
    def _model_folder(self) -> Path:
        return self.snapshot.parents[1]
