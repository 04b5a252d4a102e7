"""Drawing one item of each of the tiny family's text tasks.

Every `draw_*` function takes a `random.Random` and returns an `Item`: what the item is about (its content,
which alone decides whether it belongs to the train or the test split), the messages, and the one right answer.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import Any, Final

from ernie45.testing.task_facts import RELATIONS
from ernie45.testing.task_words import (
    ADJECTIVES,
    ADVERBS,
    CITIES,
    COLOURS,
    COLOURS_ZH,
    CONNECTORS,
    FOODS,
    FOODS_ZH,
    NAMES,
    NOUNS,
    PETS,
    PETS_ZH,
    PREPOSITIONS,
    STARTERS,
    VERBS,
)

Message = dict[str, Any]  # "content" is a text, or a list of parts where pictures or clips belong to it

CHINESE_SHARE: Final = 0.25


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One drawn question.

    `content` names what is asked, without its wording; `reasoning` is what a model may think first.
    """

    content: str
    messages: tuple[Message, ...]
    answer: str
    reasoning: str = ""


def split_of(kind: str, content: str) -> str:
    """The split that this content belongs to among all of its kind: "test" for one in eight."""
    digest = hashlib.sha256(f"{kind}: {content}".encode()).digest()
    return "test" if digest[0] % 8 == 0 else "train"


def ask(content: str, prompt: str, answer: str) -> Item:
    """An item of one user message."""
    return Item(content=content, messages=({"role": "user", "content": prompt},), answer=answer)


def pick_wording(rng: random.Random, english: tuple[str, ...], chinese: tuple[str, ...]) -> str:
    """A wording; Chinese with probability `CHINESE_SHARE`."""
    return rng.choice(chinese if rng.random() < CHINESE_SHARE else english)


ADDITION: Final = (
    (
        "What is {a} + {b}?",
        "{a} + {b} =",
        "What is {a} plus {b}?",
        "Add {a} and {b}.",
        "Calculate {a} + {b}.",
    ),
    ("{a}加{b}等于多少？", "计算{a}加{b}。", "{a} + {b} 等于多少？"),
)
SUBTRACTION: Final = (
    (
        "What is {a} - {b}?",
        "{a} - {b} =",
        "What is {a} minus {b}?",
        "Subtract {b} from {a}.",
        "Calculate {a} - {b}.",
    ),
    ("{a}减{b}等于多少？", "计算{a}减{b}。", "{a} - {b} 等于多少？"),
)


def draw_arithmetic(rng: random.Random) -> Item:
    """A sum or difference of two numbers from 0 to 99, answered as an equation: `47 - 52 = -5`."""
    a, b = rng.randrange(100), rng.randrange(100)
    sign = rng.choice("+-")
    wordings = ADDITION if sign == "+" else SUBTRACTION
    result = a + b if sign == "+" else a - b
    question = f"{a} {sign} {b}"
    return ask(question, pick_wording(rng, *wordings).format(a=a, b=b), f"{question} = {result}")


SUMS: Final = (
    ("What is {a} + {b} + {c}?", "{a} + {b} + {c} =", "Add {a}, {b} and {c}.", "What is the sum of {a}, {b} and {c}?"),
    ("{a}加{b}加{c}等于多少？", "计算{a} + {b} + {c}。"),
)


def draw_sums(rng: random.Random) -> Item:
    """The sum of three numbers from 0 to 99, reasoned in two steps: `12 + 30 = 42, 42 + 9 = 51`, then `51`."""
    a, b, c = (rng.randrange(100) for _ in range(3))
    return Item(
        content=f"{a} + {b} + {c}",
        messages=({"role": "user", "content": pick_wording(rng, *SUMS).format(a=a, b=b, c=c)},),
        answer=str(a + b + c),
        reasoning=f"{a} + {b} = {a + b}, {a + b} + {c} = {a + b + c}",
    )


LARGER: Final = (
    (
        "Which is larger, {a} or {b}?",
        "Which number is bigger: {a} or {b}?",
        "Name the larger of {a} and {b}.",
    ),
    ("{a}和{b}哪个大？", "哪个数更大，{a}还是{b}？"),
)
SMALLER: Final = (
    (
        "Which is smaller, {a} or {b}?",
        "Which number is less: {a} or {b}?",
        "Name the smaller of {a} and {b}.",
    ),
    ("{a}和{b}哪个小？", "哪个数更小，{a}还是{b}？"),
)


def draw_compare(rng: random.Random) -> Item:
    """The larger or smaller of two different numbers from 0 to 999; half of the pairs lie within 100."""
    a = rng.randrange(1000)
    b = a
    while b == a:
        b = rng.randrange(1000) if rng.random() < 0.5 else rng.randrange(max(0, a - 99), min(1000, a + 100))
    larger = rng.random() < 0.5
    content = f"{min(a, b)} {max(a, b)}"
    prompt = pick_wording(rng, *(LARGER if larger else SMALLER)).format(a=a, b=b)
    return ask(content, prompt, str(max(a, b) if larger else min(a, b)))


REVERSE: Final = (
    (
        "Reverse the word {word}.",
        "Spell {word} backwards.",
        "Write {word} in reverse order.",
        "What is {word} backwards?",
    ),
    ("把{word}倒过来写。", "{word}倒着写是什么？"),
)
UPPER_WORDS: Final = tuple(
    word.upper() for word in (*ADJECTIVES, *NOUNS, *VERBS, *NAMES, *CITIES) if 4 <= len(word) <= 8
)


def draw_reverse(rng: random.Random) -> Item:
    """A word of 4 to 8 capital letters spelt backwards: a listed word, an invented one, or any letters."""
    kind = rng.randrange(4)
    length = rng.randint(4, 8)
    if kind < 2:
        word = rng.choice(UPPER_WORDS)
    elif kind == 2:
        halves = ("BCDFGHJKLMNPRSTVWZ", "AEIOU")
        offset = rng.randrange(2)
        word = "".join(rng.choice(halves[(place + offset) % 2]) for place in range(length))
    else:
        word = "".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(length))
    return ask(word, pick_wording(rng, *REVERSE).format(word=word), word[::-1])


SORT: Final = (
    (
        "Sort these numbers: {numbers}",
        "Sort from smallest to largest: {numbers}",
        "Put {numbers} in ascending order.",
    ),
    ("从小到大排序：{numbers}", "把{numbers}从小到大排列。"),
)


def draw_sort(rng: random.Random) -> Item:
    """Four numbers from 0 to 99 in ascending order; a number may repeat."""
    numbers = [rng.randrange(100) for _ in range(4)]
    answer = ", ".join(str(number) for number in sorted(numbers))
    given = ", ".join(str(number) for number in numbers)
    return ask(answer, pick_wording(rng, *SORT).format(numbers=given), answer)


def draw_facts(rng: random.Random) -> Item:
    """One of sixty facts in one of its wordings; here the wording is part of the content."""
    relation, row = rng.choice([(relation, row) for relation in RELATIONS for row in relation.facts])
    wording = pick_wording(rng, relation.english, relation.chinese)
    in_chinese = wording in relation.chinese
    subject, answer = row[2:] if in_chinese else row[:2]
    prompt = wording.format(subject)
    return ask(prompt, prompt, answer)


EXTRACT: Final = (
    (
        "Extract name, age and city as JSON: {text}",
        "Give the name, age and city in this sentence as JSON: {text}",
        "{text} Write the name, age and city as JSON.",
    ),
    ("提取姓名、年龄和城市，用JSON回答：{text}", "{text}请用JSON写出姓名、年龄和城市。"),
)
PROFILES: Final = (
    "{name} is {age} years old and lives in {city}.",
    "{name} lives in {city} and is {age} years old.",
    "My name is {name}, I am {age} and I live in {city}.",
    "{name}, aged {age}, works in {city}.",
    "{name} from {city} is {age} years old.",
    "In {city} we met {name}, who is {age}.",
    "{name} moved to {city} at the age of {age}.",
)
PROFILES_ZH: Final = (
    "{name}今年{age}岁，住在{city}。",
    "住在{city}的{name}今年{age}岁。",
    "我叫{name}，{age}岁，在{city}工作。",
)


def draw_extract(rng: random.Random) -> Item:
    """A listed name, an age from 1 to 99 and a listed city, taken out of a sentence as JSON."""
    name, age, city = rng.choice(NAMES), rng.randint(1, 99), rng.choice(CITIES)
    wording = pick_wording(rng, *EXTRACT)
    profile = rng.choice(PROFILES_ZH if wording in EXTRACT[1] else PROFILES).format(name=name, age=age, city=city)
    answer = f'{{"name": "{name}", "age": {age}, "city": "{city}"}}'
    return ask(f"{name} {age} {city}", wording.format(text=profile), answer)


COPY: Final = (
    (
        "Copy this sentence, but write {new} instead of {old}: {text}",
        "Replace {old} with {new} in this sentence: {text}",
        "Repeat the sentence with {old} changed to {new}: {text}",
    ),
    ("把这句话里的 {old} 换成 {new}：{text}", "抄写这句话，用 {new} 代替 {old}：{text}"),
)
WORD_CLASSES: Final = (ADJECTIVES, NOUNS, VERBS, ADVERBS, PREPOSITIONS, CONNECTORS)
# A clause is: adjective? adjective? noun adverb? verb adjective? noun preposition adjective? noun.
CLAUSE_SLOTS: Final = (
    ADJECTIVES,
    ADJECTIVES,
    NOUNS,
    ADVERBS,
    VERBS,
    ADJECTIVES,
    NOUNS,
    PREPOSITIONS,
    ADJECTIVES,
    NOUNS,
)
OPTIONAL_SLOTS: Final = (0, 1, 3, 5, 8)


def draw_sentence(rng: random.Random) -> list[str]:
    """A sentence of 8 to 40 different words, without its full stop; the first word is capitalised."""
    num_words = rng.randint(8, 40)
    num_optional_max = len(OPTIONAL_SLOTS)
    num_required = len(CLAUSE_SLOTS) - num_optional_max
    # k clauses, k - 1 connectors and the starter make (num_required + 1) * k words and up to 5 * k more.
    fitting = [
        k for k in range(1, 7) if (num_required + 1) * k <= num_words <= (num_required + 1 + num_optional_max) * k
    ]
    num_clauses = rng.choice(fitting)
    optional = [(clause, slot) for clause in range(num_clauses) for slot in OPTIONAL_SLOTS]
    chosen = set(rng.sample(optional, num_words - (num_required + 1) * num_clauses))
    bags = {id(words): rng.sample(words, len(words)) for words in WORD_CLASSES}
    sentence = [rng.choice(STARTERS)]
    for clause in range(num_clauses):
        if clause:
            sentence.append(bags[id(CONNECTORS)].pop())
        for slot, words in enumerate(CLAUSE_SLOTS):
            if slot not in OPTIONAL_SLOTS or (clause, slot) in chosen:
                sentence.append(bags[id(words)].pop())
    return sentence


def draw_copy_replace(rng: random.Random) -> Item:
    """A sentence of 8 to 40 words copied with one word, never the first, replaced by another of its kind."""
    sentence = draw_sentence(rng)
    place = rng.randrange(1, len(sentence))
    old = sentence[place]
    kind = next(words for words in WORD_CLASSES if old in words)
    new = rng.choice([word for word in kind if word not in sentence])
    text = " ".join(sentence) + "."
    answer = " ".join([*sentence[:place], new, *sentence[place + 1 :]]) + "."
    return ask(f"{old} {new}: {text}", pick_wording(rng, *COPY).format(old=old, new=new, text=text), answer)


NUMBERS: Final = tuple(str(number) for number in range(100, 1000))
# What the user says, later asks, and is answered; and the values.
MEMORIES: Final = (
    ("My favourite colour is {}.", "What is my favourite colour?", "Your favourite colour is {}.", COLOURS),
    ("I have a pet {}.", "What pet do I have?", "You have a pet {}.", PETS),
    ("My favourite food is {}.", "What is my favourite food?", "Your favourite food is {}.", FOODS),
    ("I live in {}.", "Where do I live?", "You live in {}.", CITIES),
    ("My name is {}.", "What is my name?", "Your name is {}.", NAMES),
    ("My best friend is {}.", "Who is my best friend?", "Your best friend is {}.", NAMES),
    ("My room number is {}.", "What is my room number?", "Your room number is {}.", NUMBERS),
)
MEMORIES_ZH: Final = (
    ("我最喜欢的颜色是{}。", "我最喜欢的颜色是什么？", "你最喜欢的颜色是{}。", COLOURS_ZH),
    ("我的宠物是{}。", "我的宠物是什么？", "你的宠物是{}。", PETS_ZH),
    ("我最喜欢吃{}。", "我最喜欢吃什么？", "你最喜欢吃{}。", FOODS_ZH),
    ("我住在{}。", "我住在哪里？", "你住在{}。", CITIES),
    ("我叫{}。", "我叫什么名字？", "你叫{}。", NAMES),
    ("我的房间号是{}。", "我的房间号是多少？", "你的房间号是{}。", NUMBERS),
)
SMALL_TALK: Final = (
    ("How are you?", "I am fine, thank you."),
    ("Good morning!", "Good morning!"),
    ("Thank you.", "You are welcome."),
    ("The weather is nice today.", "Yes, it is."),
    ("I have a question.", "Please ask."),
)
SMALL_TALK_ZH: Final = (
    ("你好吗？", "我很好，谢谢。"),
    ("早上好！", "早上好！"),
    ("谢谢。", "不客气。"),
    ("我有一个问题。", "请问。"),
)
NOTED: Final = "Noted."
NOTED_ZH: Final = "记住了。"


def draw_recall(rng: random.Random) -> Item:
    """Something the user said two turns earlier, with another statement or small talk between."""
    in_chinese = rng.random() < CHINESE_SHARE
    memories, noted = (MEMORIES_ZH, NOTED_ZH) if in_chinese else (MEMORIES, NOTED)
    (statement, question, reply, values), (other, _, _, other_values) = rng.sample(memories, 2)
    value = rng.choice(values)
    if rng.random() < 0.7:
        between = (other.format(rng.choice([word for word in other_values if word != value])), noted)
    else:
        between = rng.choice(SMALL_TALK_ZH if in_chinese else SMALL_TALK)
    said = statement.format(value)
    messages = (
        {"role": "user", "content": said},
        {"role": "assistant", "content": noted},
        {"role": "user", "content": between[0]},
        {"role": "assistant", "content": between[1]},
        {"role": "user", "content": question},
    )
    return Item(content=f"{said} {between[0]}", messages=messages, answer=reply.format(value))


TO_CHINESE: Final = (
    ("Write {} in Chinese numerals.", "What is {} in Chinese characters?", "Convert {} to Chinese numerals."),
    ("用汉字写出{}。", "{}用中文怎么写？"),
)
TO_DIGITS: Final = (
    ("Write {} in digits.", "Which number is {}?", "Convert {} to digits."),
    ("把{}写成数字。", "{}是多少？"),
)
CHINESE_DIGITS: Final = "零一二三四五六七八九"


def chinese_numeral(number: int) -> str:
    """The usual Chinese numeral of a number from 0 to 999: 10 is 十, 105 is 一百零五, 110 is 一百一十."""
    hundreds, tens, ones = number // 100, number // 10 % 10, number % 10
    text = f"{CHINESE_DIGITS[hundreds]}百" if hundreds else ""
    if tens:
        text += "十" if tens == 1 and not hundreds else f"{CHINESE_DIGITS[tens]}十"
    elif hundreds and ones:
        text += "零"
    return text + CHINESE_DIGITS[ones] if ones or not number else text


def draw_numerals(rng: random.Random) -> Item:
    """A number from 0 to 999 written as a Chinese numeral, or a Chinese numeral as digits."""
    number = rng.randrange(1000)
    digits, numeral = str(number), chinese_numeral(number)
    if rng.random() < 0.5:
        return ask(f"{number} to Chinese", pick_wording(rng, *TO_CHINESE).format(digits), numeral)
    return ask(f"{number} to digits", pick_wording(rng, *TO_DIGITS).format(numeral), digits)
