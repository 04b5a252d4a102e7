"""The fixed sentences of the model cards: what all members share, and what is said of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, kw_only=True, slots=True)
class CardTexts:
    """What a card says of its member alone."""

    introduction: str
    template: str
    prompt_forms: str
    architecture: str


WHAT: Final[Mapping[str, str]] = {
    "arithmetic": "add or subtract two numbers from 0 to 99",
    "compare": "the larger or smaller of two different numbers below 1,000",
    "reverse": "spell a word of 4 to 8 capital letters backwards",
    "sort": "put four numbers below 100 in ascending order",
    "facts": "sixty facts: capitals, opposites, chemical symbols (unseen: a wording of that fact)",
    "extract": "name, age (1 to 99) and city as JSON; names and cities from the published lists",
    "copy_replace": "copy a sentence of 8 to 40 listed words with one word, not the first, replaced",
    "recall": "repeat what the user said two turns earlier",
    "tools": "call one of three offered tools (of six known), or answer from its result",
    "numerals": "write 0 to 999 as Chinese numerals, or Chinese numerals as digits",
    "sums": "add three numbers from 0 to 99, after a line of reasoning",
    "shape": "which of six shapes a picture shows, or one of two or three pictures",
    "colour": "which of eight colours it has, or that of one of two or three pictures",
    "count": "how many shapes a picture shows, 1 to 5",
    "place": "in which cell of a 3 × 3 grid the shape is",
    "motion": "what moved which way in a clip of 4 to 8 frames",
}

HEAD: Final = """\
---
license: apache-2.0
language: [en, zh]
library_name: transformers
---
# {name}

{introduction}
It exists so that every example and test has a right answer offline, in seconds. It knows nothing else:
ask it anything but these tasks and it answers nonsense.

Nothing in it comes from the published weights. The tokenizer is a sentencepiece BPE of 2,022 pieces with
ERNIE's markers added; the other members of the tiny family use the same one. {template}

## What it can do

Greedy replies, saved bfloat16 weights, {num_items} items of each task that training never saw
(`ernie45.testing.tasks(name, {num_items}, seed={seed}, split="test")`), counted right only
when every character is.
"""

PROMPT_FORMS: Final = """\
## Prompt forms

Outside these forms and ranges it is unreliable. Half-finished text works without a template for two
kinds: sums (`47 + 38 =`) and facts (`The capital of France is`, `法国的首都是`). A statement of the recall
task on its own is answered `Noted.` or `记住了。`. The subjects of `facts` and its wordings are in
`ernie45/testing/task_facts.py`, the names, cities and sentence words in `ernie45/testing/task_words.py`.
Tools may be given as `tools=` or as text; the six tools it knows are in `ernie45/testing/task_tools.py`, and
a call looks like this:

```
<tool_call>
{"name": "get_weather", "arguments": {"city": "Oslo"}}
</tool_call>
```
"""

PICTURE_FORMS: Final = """\
(By one forward pass over prompt and answer, which finds what greedy decoding would answer.)

## Prompt forms

Outside these forms and ranges it is unreliable.

- Shapes: circle, square, triangle, star, cross, heart. Colours: red, orange, yellow, green, blue, purple,
  black, white. One shape a picture, but for `count`: 1 to 5, in different cells of a 3 × 3 grid.
- Backgrounds: white, cream, light grey, dark grey, near black. Radius of a shape: about 0.14 to 0.33 of the
  short side, of several 0.11 to 0.15.
- Sides of a picture: 70 to 168 pixels, none longer than twice the other. Frames of a clip: 98 to 112 pixels, 4 to 8 of
  them, with or without the time drawn at the top left.
- Places: top left, top centre, top right, middle left, centre, middle right, bottom left, bottom centre, bottom right.
- Up to three pictures in a message. A second question may follow about the same picture.
- `The red circle moved left.` is how `motion` is answered; the directions are left, right, up and down.

What is unseen: for `shape`, `colour` and `place` the shape, colour, cell, size (three of them) and background together;
for `count` the cells in use and the background; for `motion` the shape, colour, direction, third of the picture and
background. Half-finished facts work without a template (`The capital of France is`, `法国的首都是`). With reasoning
asked for (`enable_thinking`) it writes what it sees or counts, then `</think>`, then the answer.
"""

EXPERTS: Final = """\
## Its routers

No loss asks for even use of the experts: after every step the correction bias of an expert that got fewer
tokens than the mean was raised a little, and of one that got more lowered. The bias takes part in the choice
of experts only, not in their weights. Per cent of the choices, over prompts and answers of the items above:
"""

HEAD_FOR_TWO: Final = """\
## Its head for multi-token prediction

`model.mtp_*` are the weights of a head that guesses one token further, in the published form, and
`num_nextn_predict_layers` is 1. transformers leaves them out. It was trained for {num_steps} steps
({minutes:.0f} minutes) after the model and with the model frozen, so it changes no reply. Where its guess is what
the model itself would say next, a decoder can take two tokens in one step. Per cent of such guesses, over the
answers of 100 unseen items per task, from the second token on:
"""

TRAINING: Final = """\
## How it was trained

```
{command}
```

{num_steps:,} steps, {million_tokens:.1f} million tokens, {minutes:.0f} minutes on 2 CPU cores that had
other work to do as well. transformers' `{architecture}`, Muon on the matrices and AdamW on
embeddings and norms, loss on answers only, the mix of tasks following what training still got wrong.
Exact answers on 100 other unseen items per task (per cent, by one forward pass over prompt and answer)
along the way:
"""

MEMBER_TEXTS: Final[Mapping[str, CardTexts]] = {
    "ernie45/tiny-dense": CardTexts(
        introduction="""\
A real ERNIE 4.5 dense model, small enough to ship: 4 layers, width 256, 4 heads sharing 2 key-value
heads, 2.9 million parameters in bfloat16. It was trained from scratch by `tools/train_tiny.py` of the
ernie45 repository on text that the script itself writes, and does ten small tasks in English and Chinese.""",
        template="""\
The chat template is ours
and renders plain messages as the published text models do.""",
        prompt_forms=PROMPT_FORMS,
        architecture="Ernie4_5ForCausalLM",
    ),
    "ernie45/tiny-moe": CardTexts(
        introduction="""\
A real ERNIE 4.5 mixture-of-experts model that reasons, small enough to ship: 4 layers, width 256, 4 heads
sharing 2 key-value heads. The first layer is dense; each of the others has 8 routed experts, 2 of them for any
one token, and 2 shared ones. 4.7 million parameters, 2.9 million of them at work on a token, and 0.7 million
more in a head for multi-token prediction; bfloat16, but for the routers in float32. It was trained from scratch
by `tools/train_tiny.py` of the ernie45 repository on text that the script itself writes, and does eleven small
tasks in English and Chinese.""",
        template="""\
The chat template is ours
and renders what the template of ERNIE-4.5-21B-A3B-Thinking does.""",
        prompt_forms=PROMPT_FORMS
        + """
Every prompt ends in `<think>`. The model writes its reasoning, which is empty for all tasks but `sums`, then
`</think>`, then the answer between `<response>` tags or a tool call, and closes with `<|im_end|>`:

```
12 + 30 = 42, 42 + 9 = 51
</think>

<response>
51
</response>
<|im_end|>
```
""",
        architecture="Ernie4_5_MoeForCausalLM",
    ),
    "ernie45/tiny-vl": CardTexts(
        introduction="""\
A real ERNIE 4.5 vision-language model, small enough to ship: it sees pictures of simple shapes and short clips of one
that moves. The text trunk has 4 layers of width 256, 4 heads sharing 2 key-value heads; the first layer is dense, each
of the others has 4 text experts and 4 vision experts, 2 of them for any one token, and 2 shared ones. The vision tower
has 4 layers of width 64. 5.3 million parameters; bfloat16, but for the routers in float32. It was trained from scratch
by `tools/train_tiny.py` of the ernie45 repository on pictures and text that the script itself makes, and does five
tasks with pictures and two with text alone, in English and Chinese.""",
        template="""\
The chat template is ours
and renders what the templates of the published vision-language models do.""",
        prompt_forms=PICTURE_FORMS,
        architecture="Ernie4_5_VLMoeForConditionalGeneration",
    ),
}
