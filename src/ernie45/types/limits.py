"""How much a picture or clip from outside may cost: bytes, pixels, redirects and seconds."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from ernie45.errors import InvalidRequestError


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaLimits:
    """What is refused, so that nobody's picture fills the memory, hangs the program or reaches the network inside.

    `max_bytes` is of a file as stored or sent, `max_pixels` of a picture's width times height, checked before it is
    decoded (about 4 bytes of memory each as RGB, up to 16 with transparency or 16-bit grey). A URL has
    `connect_seconds` for each connection, `read_seconds` for each wait and `total_seconds` in all, through at most
    `max_redirects`. `allow_private_urls` allows addresses that are not on the public internet: this machine, the local
    network, a cloud's metadata service.

    Raises InvalidRequestError for a limit that is not a number above 0 (`max_redirects`: 0 or more).
    """

    max_bytes: int = 100_000_000
    max_pixels: int = 178_956_970
    max_redirects: int = 5
    connect_seconds: float = 10.0
    read_seconds: float = 10.0
    total_seconds: float = 30.0
    allow_private_urls: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "allow_private_urls":
                fits, wanted = isinstance(value, bool), "True or False"
            elif field.name.endswith("_seconds"):
                fits, wanted = _is_number(value) and 0 < value < math.inf, "seconds above 0"
            else:
                least = 0 if field.name == "max_redirects" else 1
                fits, wanted = _is_number(value) and isinstance(value, int) and value >= least, f"an int from {least}"
            if not fits:
                raise InvalidRequestError(f"MediaLimits: {field.name} is {value!r:.100}", hint=f"give {wanted}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
