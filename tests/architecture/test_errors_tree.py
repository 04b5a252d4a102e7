"""The tree drawn in the docstring of ernie45.errors is the tree of its classes."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

import ernie45
from ernie45 import errors

CLASSES = [value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, errors.ErnieError)]


def test_the_drawing_has_every_class_under_its_base() -> None:
    assert _drawn_tree() == {value.__name__: value.__bases__[0].__name__ for value in CLASSES}


@pytest.mark.parametrize("error_class", CLASSES)
def test_every_error_is_public_and_documented(error_class: type[errors.ErnieError]) -> None:
    assert error_class.__name__ in ernie45.__all__
    assert error_class.__doc__


@pytest.mark.parametrize("error_class", CLASSES)
def test_every_error_survives_pickling(error_class: type[errors.ErnieError]) -> None:
    error = pickle.loads(pickle.dumps(error_class("7 of 8 are missing", hint="add one")))
    assert type(error) is error_class
    assert str(error) == "7 of 8 are missing\n  -> add one"


def _drawn_tree() -> dict[str, str]:
    """Class name -> name of the class that it hangs from, read off the indentation."""
    tree: dict[str, str] = {}
    branch: list[tuple[int, str]] = []
    for line in inspect.cleandoc(errors.__doc__ or "").splitlines():
        if match := re.match(r"([\s│├└─]*)(\w+Error)\b", line):
            indent, name = len(match[1]), match[2]
            while branch and branch[-1][0] >= indent:
                branch.pop()
            tree[name] = branch[-1][1] if branch else "Exception"
            branch.append((indent, name))
    return tree
