"""What one rendering of a chat template may cost, and the arithmetic of what its operations would make."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping

from ernie45.errors import TemplateError

# The longest published template takes about 20 steps and 8 copies of the text per message.
MAX_STEPS = 250_000
MAX_CPU_SECONDS = 1.0
MAX_CALL_DEPTH = 50
BASE_CHARACTERS = 1_000_000
CHARACTERS_PER_INPUT_CHARACTER = 64
MAX_INTEGER_BITS = 128
MAX_PADDING = 1000
MAX_LOOP_NESTING = 16

# What an element of a list or dict counts for, in characters; about the bytes it takes in memory.
_ELEMENT = 16
_TOO_LONG_WIDTH = re.compile(r"\d{4}|\*")


class Budget:
    """Counts the steps, CPU time, nesting and characters of one rendering.

    `input_size` is `size_of` the messages and variables; what a template may make grows with it.
    """

    def __init__(self, input_size: int) -> None:
        self._steps_left = MAX_STEPS
        self._deadline = time.thread_time() + MAX_CPU_SECONDS
        self._depth = 0
        self._characters = BASE_CHARACTERS + CHARACTERS_PER_INPUT_CHARACTER * input_size
        self._characters_left = self._characters

    def step(self) -> None:
        """Count one loop turn, call, filter or comparison."""
        self._steps_left -= 1
        if self._steps_left < 0:
            raise _exceeded(f"took more than {MAX_STEPS} steps")
        # Steps differ in cost, so time is the second limit; reading the clock costs as much as a step.
        if self._steps_left % 16 == 0 and time.thread_time() > self._deadline:
            raise _exceeded(f"took more than {MAX_CPU_SECONDS} seconds")

    def enter_call(self) -> None:
        """Count a call, and how deep calls are nested until `leave_call`."""
        self.step()
        self._depth += 1
        if self._depth > MAX_CALL_DEPTH:
            raise _exceeded(f"nested its calls more than {MAX_CALL_DEPTH} deep")

    def leave_call(self) -> None:
        self._depth -= 1

    def spend(self, characters: int) -> None:
        """Count text that is about to be made."""
        self._characters_left -= characters
        if self._characters_left < 0:
            raise _exceeded(f"made more than {self._characters} characters of text")

    def spend_size_of(self, value: object) -> None:
        """Count all that printing `value` would print."""
        self.spend(size_of(value, limit=self._characters_left + 1))


def size_of(value: object, *, limit: int) -> int:
    """Characters of text in a value, plus 16 for each element of a container; stops counting at `limit`.

    A list that holds one list twice counts it twice, as printing it would.
    """
    size = 0
    pending = [value]
    while pending and size < limit:
        item = pending.pop()
        if isinstance(item, str):
            size += len(item)
        elif isinstance(item, Mapping):
            size += 2 * _ELEMENT * len(item)
            pending.extend(item.keys())
            pending.extend(item.values())
        elif isinstance(item, (list, tuple)):
            size += _ELEMENT * len(item)
            pending.extend(item)
    return size


def repeated_size(left: object, right: object) -> int:
    """Size of `left * right`, before it is made."""
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())
        return 0
    if isinstance(right, (str, list, tuple)):
        left, right = right, left
    if isinstance(left, str) and isinstance(right, int):
        return len(left) * max(right, 0)
    if isinstance(left, (list, tuple)) and isinstance(right, int):
        return _ELEMENT * len(left) * max(right, 0)
    return 0


def check_power(base: object, exponent: object) -> None:
    """Refuse `base ** exponent` where it would be a huge integer."""
    if isinstance(base, int) and isinstance(exponent, int) and exponent > 0:
        _check_bits(base.bit_length() * exponent)


def formatted_size(pattern: str) -> int:
    """Most characters that the paddings of a %-pattern can add, before it is filled in."""
    if _TOO_LONG_WIDTH.search(pattern):
        raise _exceeded(f"pads text to more than {MAX_PADDING} characters")
    return len(pattern) + MAX_PADDING * pattern.count("%")


def replaced_size(text: str, old: str, new: str) -> int:
    """Size of `text.replace(old, new)`, before it is made."""
    return len(text) + text.count(old) * max(len(new) - len(old), 0)


def check_loop_nesting(loops: int) -> None:
    """Refuse loops within loops for which jinja2 would take seconds to compile."""
    if loops > MAX_LOOP_NESTING:
        raise _exceeded(f"nests its loops more than {MAX_LOOP_NESTING} deep")


def check_short(text: object, what: str) -> None:
    """Refuse a parameter that should be a few characters and is a text."""
    if isinstance(text, str) and len(text) > MAX_PADDING:
        raise _exceeded(f"uses {len(text)} characters as {what}")


def check_width(width: object) -> None:
    """Refuse a padding or indentation, given as a number of spaces or as text, that is no such thing."""
    if (width if isinstance(width, int) else len(str(width))) > MAX_PADDING:
        raise _exceeded(f"pads text to more than {MAX_PADDING} characters")


def _check_bits(bits: int) -> None:
    if bits > MAX_INTEGER_BITS:
        raise _exceeded(f"computes an integer of more than {MAX_INTEGER_BITS} bits")


def _exceeded(what: str) -> TemplateError:
    return TemplateError(
        f"the chat template {what}, which no chat needs",
        hint="use the template of the published checkpoint; this one is broken, or was made to do harm",
    )
