"""The jinja2 environment chat templates run in: what transformers offers them, with limits on what they make.

Three things hold together: every loop turn, call, filter and comparison is a step of the budget; every text
or container is counted before it is kept; and what makes much out of little (paddings, powers, formats) is
refused or computed beforehand. So no single operation takes longer than milliseconds, and the budget is asked
between any two.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import loopcontrols
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from ernie45.errors import TemplateError
from ernie45.tokenizer import template_limits as limits
from ernie45.tokenizer.template_limits import Budget

# Filters whose result is no larger than what they are given (or a few times larger, for upper and escape).
_PLAIN_FILTERS = """
    abs capitalize count d default dictsort e escape first float items last length list lower map max min
    reject rejectattr reverse safe select selectattr sort title unique upper
"""
_TEXT_METHODS = """
    capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit islower isnumeric
    isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex
    rpartition rsplit rstrip split splitlines startswith strip swapcase title upper
"""
_METHODS: tuple[tuple[type | tuple[type, ...], frozenset[str]], ...] = (
    (str, frozenset(_TEXT_METHODS.split())),
    (Mapping, frozenset(("get", "items", "keys", "values"))),
    ((list, tuple, range), frozenset(("count", "index"))),
    ((int, float, bytes, type), frozenset()),
)


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """An environment for one template, and one rendering at a time: set `budget` before each."""

    intercepted_binops = frozenset(("+", "*", "%", "**"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols],
            optimized=False,  # or constant expressions would run while compiling, outside the budget
            finalize=self._printed,
        )
        self.budget = Budget(0)
        self.globals = {
            "range": self.globals["range"],
            "dict": dict,
            "namespace": Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": lambda pattern: datetime.now().strftime(pattern),
        }
        special: dict[str, Callable[..., Any]] = {
            "format": self._format,
            "indent": _indent,
            "int": _int,
            "join": self._join,
            "replace": self._replace,
            "string": self._text,
            "tojson": self._to_json,
            "trim": _trim,
        }
        plain = {name: FILTERS[name] for name in _PLAIN_FILTERS.split()}
        self.filters = {name: self._counted(function) for name, function in {**plain, **special}.items()}

    def compile_guarded(self, source: str) -> jinja2.Template:
        """Compile a template with the budget built in.

        Raises:
            jinja2.TemplateSyntaxError: the source is not jinja2, or uses a filter that is not offered.
        """
        tree = _Guard().visit(self.parse(source))
        tree.set_environment(self)
        return self.from_string(tree)

    # Called by compiled templates.

    def turn(self) -> bool:
        """Does nothing: calling it is what counts."""
        return True

    def built(self, value: object) -> object:
        self.budget.spend_size_of(value)
        return value

    def joined(self, *values: object) -> str:
        return "".join(self._text(value) for value in values)

    def cut(self, value: Any, start: object, stop: object, step: object) -> object:
        part = value[start:stop:step]
        self.budget.spend(16 * len(part))
        return part

    # Called by jinja2.

    def call(__self, __context: Context, __function: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        # jinja2's own names: any other would clash with keyword arguments of the template's call.
        owner = getattr(__function, "__self__", None)
        __self.budget.enter_call()
        if isinstance(owner, str):
            __self._check_text_method(owner, __function.__name__, args, kwargs)
        result = super().call(__context, __function, *args, **kwargs)
        __self.budget.leave_call()  # an error ends the rendering, and with it the budget
        if isinstance(owner, str) or __function is dict or isinstance(__function, Macro):
            __self.budget.spend_size_of(result)
        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            self.budget.spend(limits.repeated_size(left, right))
        elif operator == "**":
            limits.check_power(left, right)
        elif operator == "%" and isinstance(left, str):
            return self._format(left, *(right if isinstance(right, tuple) else (right,)))
        result = super().call_binop(context, operator, left, right)
        self.budget.spend_size_of(result)
        return result

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for kind, allowed in _METHODS:
            if isinstance(obj, kind):
                return attr in allowed
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """Nothing to wrap: `str.format` is not offered, its paddings cannot be told beforehand."""

    @jinja2.pass_context  # which keeps jinja2 from printing constants while it compiles
    def _printed(self, context: Context, value: object) -> str:
        return self._text(value)

    def _text(self, value: object) -> str:
        """`str(value)`, counted beforehand."""
        if isinstance(value, (Namespace, Macro)):
            raise TemplateError("the chat template prints an object that has no text", hint="print its attributes")
        self.budget.spend_size_of(value)
        return value if isinstance(value, str) else str(value)

    def _check_text_method(self, text: str, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        for name, value in kwargs.items():
            limits.check_short(value, name)
        if method == "replace" and len(args) >= 2:
            self.budget.spend(limits.replaced_size(text, str(args[0]), str(args[1])))
        elif method == "join" and args:
            if not isinstance(args[0], (list, tuple, str)):
                raise TemplateError("the chat template joins something that is not a list", hint="use |list|join")
            self.budget.spend(len(text) * len(args[0]))
            self.budget.spend_size_of(args[0])
        elif method in ("strip", "lstrip", "rstrip") and args:
            limits.check_short(args[0], "what to strip")

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)  # also carries over how jinja2 wants the filter called
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.budget.step()
            result = function(*args, **kwargs)
            if isinstance(result, (str, list)):
                self.budget.spend(16 * len(result) if isinstance(result, list) else len(result))
            return result

        return counted

    # Filters that replace jinja2's own, to the same results.

    def _format(self, pattern: object, *args: object) -> str:
        text = self._text(pattern)
        self.budget.spend(limits.formatted_size(text))
        self.budget.spend_size_of(args)
        return text % (args[0] if len(args) == 1 and isinstance(args[0], Mapping) else args)

    def _join(self, value: Iterable[Any], d: object = "", attribute: str | int | None = None) -> str:
        picked = value if attribute is None else map(make_attrgetter(self, attribute), value)
        items = [self._text(item) for item in picked]
        separator = self._text(d)
        self.budget.spend(len(separator) * len(items))
        return separator.join(items)

    def _replace(self, value: object, old: object, new: object, count: int | None = None) -> str:
        text, old, new = self._text(value), self._text(old), self._text(new)
        self.budget.spend(limits.replaced_size(text, old, new))
        return text.replace(old, new, -1 if count is None else count)

    def _to_json(
        self,
        value: object,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        limits.check_width(indent or 0)
        for separator in separators or ():
            limits.check_width(separator)
        encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        chunks = []
        for chunk in encoder.iterencode(value):  # in pieces, each counted before the next is made
            self.budget.spend(len(chunk))
            chunks.append(chunk)
        return "".join(chunks)


class _Guard(NodeTransformer):
    """Rewrites a parsed template so that what jinja2 does by itself goes through the environment as well."""

    def __init__(self) -> None:
        self._loops = 0

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        self._loops += 1
        limits.check_loop_nesting(self._loops)
        self.generic_visit(node)
        self._loops -= 1
        node.body.insert(0, nodes.ExprStmt(_call("turn"), lineno=node.lineno))
        if node.test is not None:
            node.test = nodes.And(_call("turn"), node.test)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return nodes.And(_call("turn"), node)

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:  # noqa: N802
        return nodes.Const(node.data)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _call("joined", *node.nodes)

    def visit_List(self, node: nodes.List) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _call("built", node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _call("built", node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _call("built", node) if node.ctx == "load" else node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        bounds = (node.arg.start, node.arg.stop, node.arg.step)
        return _call("cut", node.node, *(nodes.Const(None) if bound is None else bound for bound in bounds))


def _call(method: str, *args: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), list(args), [], None, None)


def _raise_exception(message: object) -> NoReturn:
    raise TemplateError(f"the chat template refuses these messages: {message}", hint="change the messages as it says")


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    limits.check_width(width)
    indented: str = FILTERS["indent"](text, width, first, blank)
    return indented


def _int(value: Any, default: int = 0, base: int = 10) -> int:
    limits.check_short(value, "a number")
    number: int = FILTERS["int"](value, default, base)
    return number


def _trim(value: object, chars: str | None = None) -> str:
    limits.check_short(chars, "what to strip")
    trimmed: str = FILTERS["trim"](value, chars)
    return trimmed
