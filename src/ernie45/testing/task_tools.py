"""Drawing items of the tiny family's `tools` task: call one of three tools, or answer from its result.

Tools, calls and results stand in the messages as plain text, word for word as the tiny chat template writes
`tools=`, `tool_calls` and role `tool`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from ernie45.testing.task_items import Item, Message
from ernie45.testing.task_words import CITIES, NAMES, WEATHERS

Values = dict[str, str | int]


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolKind:
    """A tool: its parameters, how users ask for it, what it gives back, and the reply made from that."""

    name: str
    parameters: Mapping[str, str]
    wordings: tuple[str, ...]
    draw_arguments: Callable[[random.Random], Values]
    draw_result: Callable[[random.Random], Values]
    reply: str

    def schema(self) -> dict[str, object]:
        """The tool in OpenAI function form."""
        properties = {name: {"type": kind} for name, kind in self.parameters.items()}
        parameters = {"type": "object", "properties": properties}
        return {"type": "function", "function": {"name": self.name, "parameters": parameters}}


def _draw_time(rng: random.Random) -> str:
    return f"{rng.randrange(24):02}:{rng.randrange(60):02}"


def _draw_route(rng: random.Random) -> Values:
    origin, destination = rng.sample(CITIES, 2)
    return {"origin": origin, "destination": destination}


TOOL_KINDS: Final = (
    ToolKind(
        name="get_weather",
        parameters={"city": "string"},
        wordings=("What is the weather in {city}?", "How is the weather in {city} today?"),
        draw_arguments=lambda rng: {"city": rng.choice(CITIES)},
        draw_result=lambda rng: {"weather": rng.choice(WEATHERS), "degrees": rng.randint(1, 35)},
        reply="The weather in {city} is {weather}, {degrees} degrees.",
    ),
    ToolKind(
        name="get_time",
        parameters={"city": "string"},
        wordings=("What time is it in {city}?", "Tell me the time in {city}."),
        draw_arguments=lambda rng: {"city": rng.choice(CITIES)},
        draw_result=lambda rng: {"time": _draw_time(rng)},
        reply="It is {time} in {city}.",
    ),
    ToolKind(
        name="get_phone",
        parameters={"name": "string"},
        wordings=("What is the phone number of {name}?", "Find the phone number of {name}."),
        draw_arguments=lambda rng: {"name": rng.choice(NAMES)},
        draw_result=lambda rng: {"phone": rng.randint(1000, 9999)},
        reply="The phone number of {name} is {phone}.",
    ),
    ToolKind(
        name="set_timer",
        parameters={"minutes": "integer"},
        wordings=("Set a timer for {minutes} minutes.", "Start a timer of {minutes} minutes."),
        draw_arguments=lambda rng: {"minutes": rng.randint(2, 120)},
        draw_result=lambda rng: {"ends": _draw_time(rng)},
        reply="The timer is set for {minutes} minutes and ends at {ends}.",
    ),
    ToolKind(
        name="book_hotel",
        parameters={"city": "string", "nights": "integer"},
        wordings=(
            "Book a hotel in {city} for {nights} nights.",
            "I need {nights} nights in a hotel in {city}.",
        ),
        draw_arguments=lambda rng: {"city": rng.choice(CITIES), "nights": rng.randint(2, 30)},
        draw_result=lambda rng: {"price": rng.randint(100, 999)},
        reply="A hotel in {city} for {nights} nights costs {price}.",
    ),
    ToolKind(
        name="find_flight",
        parameters={"origin": "string", "destination": "string"},
        wordings=(
            "Find a flight from {origin} to {destination}.",
            "I want to fly from {origin} to {destination}.",
        ),
        draw_arguments=_draw_route,
        draw_result=lambda rng: {"flight": rng.randint(100, 999), "departs": _draw_time(rng)},
        reply="Flight {flight} from {origin} to {destination} leaves at {departs}.",
    ),
)


def tool_list_text(schemas: list[dict[str, object]]) -> str:
    """The system text that offers tools, without the newline a system message ends with."""
    return "<tool_list>\n[" + ", ".join(json.dumps(schema) for schema in schemas) + "]\n</tool_list>"


def tool_call_text(name: str, arguments: Values) -> str:
    """The reply that calls a tool."""
    return "<tool_call>\n" + json.dumps({"name": name, "arguments": arguments}) + "\n</tool_call>"


def tool_output_text(result: Values) -> str:
    """The user text that hands a tool's result back."""
    return "<tool_output>\n" + json.dumps(result) + "\n</tool_output>"


def draw_tools(rng: random.Random) -> Item:
    """A request that one of three offered tools serves: half the items want the call, half the reply."""
    offered = rng.sample(TOOL_KINDS, 3)
    tool = rng.choice(offered)
    arguments = tool.draw_arguments(rng)
    call = tool_call_text(tool.name, arguments)
    messages: tuple[Message, ...] = (
        {"role": "system", "content": tool_list_text([kind.schema() for kind in offered])},
        {"role": "user", "content": rng.choice(tool.wordings).format(**arguments)},
    )
    content = f"{tool.name} {json.dumps(arguments)}"
    if rng.random() < 0.5:
        return Item(content=content, messages=messages, answer=call)
    result = tool.draw_result(rng)
    outcome: tuple[Message, ...] = (
        {"role": "assistant", "content": call},
        {"role": "user", "content": tool_output_text(result)},
    )
    return Item(content=content, messages=messages + outcome, answer=tool.reply.format(**arguments, **result))
