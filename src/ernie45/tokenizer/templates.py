"""Chat templates: messages to the text a model was trained on."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ernie45.errors import TemplateError, TokenizerError
from ernie45.tokenizer.reply_parser import THINK
from ernie45.tokenizer.template_limits import Budget, size_of
from ernie45.tokenizer.token_files import check_size, read_token_files
from ernie45.types.messages import Message

if TYPE_CHECKING:
    import jinja2

    from ernie45.tokenizer.sandbox import ChatEnvironment

# What the published text checkpoints (0.3B, 21B-A3B, 300B-A47B; Base too) render, in our words.
ERNIE45_TEMPLATE = """\
{{ cls_token | default("<|begin_of_sentence|>") }}
{%- for turn in messages %}
    {%- if turn.role == "system" %}
        {{- turn.content + "\\n" }}
    {%- elif turn.role == "user" %}
        {{- "User: " + turn.content + "\\n" }}
    {%- elif turn.role == "assistant" %}
        {{- "Assistant: " + turn.content + sep_token | default("<|end_of_sentence|>") }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "Assistant: " }}
{%- endif %}"""

MAX_SOURCE_CHARACTERS = 64 * 1024

# What an expression can raise; in a template it is a failure of the template, or of its messages.
_EXPRESSION_FAULTS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


class ChatTemplate:
    """A jinja2 chat template, run in a sandbox with limits. Safe to use from several threads.

    `special_tokens` are variables of the template, such as `{"cls_token": "<|begin_of_sentence|>"}`.

    Raises:
        TemplateError: the source is longer than any template (`MAX_SOURCE_CHARACTERS`).
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        if len(source) > MAX_SOURCE_CHARACTERS:
            raise TemplateError(
                f"the chat template is {len(source)} characters long, more than {MAX_SOURCE_CHARACTERS}",
                hint="use the template of the published checkpoint",
            )
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._compiled: tuple[ChatEnvironment, jinja2.Template] | None = None
        # One rendering at a time, since the environment holds the budget; it takes well under a millisecond.
        self._lock = threading.Lock()

    @property
    def knows_reasoning(self) -> bool:
        """Whether this is the template of a model that can think."""
        return THINK in self.source

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """Render messages to prompt text, up to where the assistant is to speak if `add_generation_prompt`.

        `variables` are further ones the template knows, such as `{"tools": […]}`.

        Raises:
            TemplateError: the template is broken, refuses the messages, or runs past its limits.
        """
        # As in transformers, tools and documents are always defined, None where there are none.
        values = {
            "tools": None,
            "documents": None,
            **self._special_tokens,
            **(variables or {}),
            "messages": list(messages),
            "add_generation_prompt": add_generation_prompt,
        }
        with self._lock:
            environment, template = self._compiled = self._compiled or _compiled(self.source)
            environment.budget = Budget(size_of(values, limit=2**40))
            return _rendered(template, values)


def load_template(folder: Path) -> ChatTemplate:
    """Load a folder's chat template: chat_template.jinja, else the one in tokenizer_config.json, else that of the
    published text checkpoints.

    Raises:
        TokenizerError: a file cannot be read or is broken.
        TemplateError: the template is longer than any template.
    """
    files = read_token_files(folder)
    path = folder / "chat_template.jinja"
    check_size(path)
    try:
        source: str | None = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        source = files.chat_template
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(
            f"{path} cannot be read: {error}", hint="fetch the file again from where the checkpoint came from"
        ) from error
    return ChatTemplate(ERNIE45_TEMPLATE if source is None else source, files.roles)


def _compiled(source: str) -> tuple[ChatEnvironment, jinja2.Template]:
    # Here and not above: jinja2 takes 50 ms to import, and completing text needs none of it.
    import jinja2

    from ernie45.tokenizer.sandbox import ChatEnvironment

    environment = ChatEnvironment()
    try:
        return environment, environment.compile_guarded(source)
    # Beside its own errors, jinja2 lets through what Python says to nesting and numbers beyond its limits.
    except (jinja2.TemplateError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f" (line {error.lineno})" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise TemplateError(
            f"the chat template cannot be compiled{line}: {str(error) or type(error).__name__}",
            hint="use the template of the published checkpoint",
        ) from error


def _rendered(template: jinja2.Template, values: Mapping[str, object]) -> str:
    import jinja2

    try:
        return template.render(values)
    except TemplateError:
        raise
    except (jinja2.TemplateError, *_EXPRESSION_FAULTS) as error:
        raise TemplateError(
            f"the chat template failed on these messages: {str(error) or type(error).__name__}",
            hint='it may take text only: give every message its "content" as a string, and a role it knows',
        ) from error
