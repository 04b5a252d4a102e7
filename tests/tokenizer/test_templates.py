from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ernie45.errors import TemplateError, TokenizerError
from ernie45.tokenizer import ERNIE45_TEMPLATE, ChatTemplate, load_template, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ernie45.types.messages import Message


def message(role: str, content: str, **fields: Any) -> Any:
    return {"role": role, "content": content, **fields}


CONVERSATIONS: list[list[Message]] = [
    [message("user", "hi")],
    [message("system", "S"), message("user", "你好\n😀 <b> {{ x }} & 'q'")],
    [message("user", "a"), message("assistant", "b"), message("user", "c")],
    [message("user", "a"), message("system", "late"), message("assistant", ""), message("user", "  spaced  ")],
    [message("user", ""), message("assistant", "<|end_of_sentence|>"), message("tool", "dropped")],
    [message("assistant", "first")],
]
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "天气 <now>", "parameters": {"a": [1, 2.5]}}},
    {"type": "function", "function": {"name": "time", "parameters": {}}},
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "北京"}}}
THINKING_CONVERSATIONS: list[list[Message]] = [
    *CONVERSATIONS[:4],
    [message("user", "q"), message("assistant", "<think>\nhm\n</think>\n\nanswer"), message("user", "again")],
    [message("user", "q"), message("assistant", "x", thoughts="because", tool_calls=[CALL, CALL])],
    [
        message("system", "S"),
        message("user", "q"),
        message("assistant", "", tool_calls=[{"name": "f", "arguments": '{"a": 1}'}]),
        message("tool", '{"t": "晴"}'),
        message("tool", "two"),
    ],
    [
        message("user", "q"),
        message("assistant", "old", thoughts="dropped"),
        message("user", "again"),
        message("assistant", "", thoughts="\nkept\n", tool_calls=[CALL]),
        message("tool", "20"),
        message("assistant", "new", thoughts="kept as well"),
    ],
    [
        message("user", "q"),
        message("assistant", "call", thoughts="kept"),
        message("user", "<tool_output>\n20\n</tool_output>"),
    ],
    [message("user", "q"), message("assistant", "a", thoughts=""), message("assistant", "</think>", thoughts="b")],
]


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_published_template_as_transformers(
    published_folder: Path,
    reference: PreTrainedTokenizerBase,
    messages: list[Any],
    add_generation_prompt: bool,
) -> None:
    expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    published = load_template(published_folder)
    assert published.source != ERNIE45_TEMPLATE
    assert published.render(messages, add_generation_prompt=add_generation_prompt) == expected
    ours = ChatTemplate(ERNIE45_TEMPLATE, {})
    assert ours.render(messages, add_generation_prompt=add_generation_prompt) == expected


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("messages", THINKING_CONVERSATIONS)
def test_thinking_template_as_transformers(
    shared_data: Path, reference: PreTrainedTokenizerBase, messages: list[Any], tools: list[Any] | None
) -> None:
    source = (shared_data / "chat_templates" / "ernie45-21b-thinking.jinja").read_text()
    expected = reference.apply_chat_template(
        messages, tools=tools, chat_template=source, tokenize=False, add_generation_prompt=True
    )
    assert ChatTemplate(source, {}).render(messages, variables={"tools": tools}) == expected


FEATURES = """
{% macro line(m, mark='-') %}
    {{ mark }}{{ m.role | upper }}: {{ m['content'] | trim | replace('a', 'bb') | indent(2, true) }}
{% endmacro %}
{% for m in messages if m.role != 'tool' %}
    {% if loop.index > 9 %}{% break %}{% endif %}
    {{ line(m, mark=loop.cycle('*', '+')) }}{{ loop.last ~ loop.index0 ~ loop.length }}
{% else %}none
{% endfor %}
{% set ns = namespace(text='', list=[]) %}
{% for c in 'xyz' %}{% set ns.text = c + ns.text %}{% set ns.list = ns.list + [c, (1, c)] %}{% endfor %}
{{ ns.text }} {{ ns.list }} {{ {'k': [none, true, 1.5]} }} {{ messages[::-1] | map(attribute='role') | join('/') }}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }} {{ undefined_name }} {{ 'a' in 'abc' }}
{{ '%s-%03d' % ('p', 7) }} {{ '%s!' | format('q') }} {{ 'ab' * 3 }} {{ 2 ** 10 }} {{ '7' | int + 1 }}
{{ ['é', 1] | tojson }} {{ {'b': 1, 'a': '<'} | tojson(indent=2, sort_keys=true) }} {{ 'a,b'.split(',') }}
{{ ', '.join(['x', 'y']) }} {{ 'x' | default('d') }} {{ nothing | default('d') }} {{ {'a': 1}.get('z') }}
{{ {'b': 1, 'a': 2} | dictsort }} {{ {'a': 1}.items() | list }} {{ range(3) | list }} {{ dict(a=1) }}
{%- set block %}kept {{ 1 < 2 < 3 }}{% endset %}{{ block }} {% filter upper %}loud{% endfilter %}
{% for x in [[1, [2]], 3] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}
{% call(x) wrap() %}called {{ x }}{% endcall %}
{{ messages[0].content[1:3] ~ messages[0].content[:-1] }} {{ '<' | e }} {{ tools is none }} {{ documents is none }}
"""
WRAP = "{% macro wrap() %}[{{ caller(1) }}]{% endmacro %}"


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_jinja_features_as_transformers(reference: PreTrainedTokenizerBase, messages: list[Any]) -> None:
    source = WRAP + FEATURES
    expected = reference.apply_chat_template(messages, chat_template=source, tokenize=False)
    rendered = ChatTemplate(source, reference.special_tokens_map).render(messages, add_generation_prompt=False)
    assert rendered == expected


def test_golden_chat_ids(shared_data: Path, published_folder: Path) -> None:
    golden = json.loads((shared_data / "golden" / "tokenization.json").read_text())["chat"]
    tokenizer = load_tokenizer(published_folder)
    assert tokenizer is not None
    assert tokenizer.encode(load_template(published_folder).render(golden["messages"])) == golden["ids"]


def test_our_template_says_what_the_model_was_trained_on() -> None:
    messages = [message("system", "S"), message("user", "hi"), message("assistant", "yes"), message("user", "ok")]
    assert ChatTemplate(ERNIE45_TEMPLATE, {"sep_token": "|"}).render(messages) == (
        "<|begin_of_sentence|>S\nUser: hi\nAssistant: yes|User: ok\nAssistant: "
    )


def test_where_the_template_is_found(tmp_path: Path) -> None:
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"cls_token": "<c>"}))
    assert load_template(tmp_path).source == ERNIE45_TEMPLATE
    config = {"chat_template": [{"name": "default", "template": "{{ cls_token }}config"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_template(tmp_path).render([]) == "<c>config"
    (tmp_path / "chat_template.jinja").write_text("{{ cls_token }}file")
    assert load_template(tmp_path).render([]) == "<c>file"


def test_template_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja"):
        load_template(tmp_path)


def test_refusal_of_the_template_is_passed_on() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(TemplateError, match="roles must alternate"):
        template.render([message("user", "hi")])


@pytest.mark.parametrize("content", [None, 3, [{"type": "text", "text": "hi"}]])
def test_content_the_template_cannot_take(content: Any) -> None:
    with pytest.raises(TemplateError, match="failed on these messages") as caught:
        ChatTemplate(ERNIE45_TEMPLATE, {}).render([{"role": "user", "content": content}])
    assert "content" in caught.value.hint


@pytest.mark.parametrize(
    "source",
    ["{% for %}", "{{ 'a' | no_such_filter }}", "{{ " + "(" * 5000, "{{ " + "9" * 6000 + " }}", "{{ x ", "{% x %}"],
)
def test_source_that_is_no_template(source: str) -> None:
    with pytest.raises(TemplateError, match="cannot be compiled"):
        ChatTemplate(source, {}).render([])


def test_source_longer_than_any_template() -> None:
    with pytest.raises(TemplateError, match="65537 characters"):
        ChatTemplate("x" * 65537, {})


def test_renders_in_several_threads_at_once() -> None:
    template = ChatTemplate(ERNIE45_TEMPLATE, {})
    texts: dict[int, str] = {}

    def work(number: int) -> None:
        texts[number] = template.render([message("user", str(number))] * 50)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = {n: "<|begin_of_sentence|>" + f"User: {n}\n" * 50 + "Assistant: " for n in range(8)}
    assert texts == expected
