"""The local runner: our engine, in a thread of this process."""

from __future__ import annotations

from ernie45.backends.base import Backend
from ernie45.engine.engine import Engine
from ernie45.engine.speculation.speculation import Speculation
from ernie45.memory.budget import KVDtype
from ernie45.runners.base import Handle
from ernie45.types.placement import Placement
from ernie45.types.requests import TokenRequest


class LocalRunner:
    """Runs requests on `backend` here, up to `num_slots` at a time; more wait their turn."""

    def __init__(
        self,
        backend: Backend,
        *,
        num_slots: int,
        context_tokens: int,
        num_token_ids: int,
        kv_dtype: KVDtype = "auto",
        placement: Placement | None = None,
        prefix_cache: bool = True,
        speculation: Speculation | None = None,
    ) -> None:
        """The arguments are those of `Engine`."""
        self._engine = Engine(
            backend,
            num_slots=num_slots,
            context_tokens=context_tokens,
            num_token_ids=num_token_ids,
            kv_dtype=kv_dtype,
            placement=placement,
            prefix_cache=prefix_cache,
            speculation=speculation,
        )

    def submit(self, request: TokenRequest) -> Handle:
        return self._engine.submit(request)

    def close(self) -> None:
        self._engine.close()
