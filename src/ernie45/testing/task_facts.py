"""The sixty facts of the tiny family's `facts` task and the wordings that ask for them.

A relation holds its facts as (English subject, English answer, Chinese subject, Chinese answer); a wording
has one `{}` for the subject, and is answered in its own language.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, kw_only=True, slots=True)
class Relation:
    """One kind of fact: its table and the wordings that ask for any row of it."""

    facts: tuple[tuple[str, str, str, str], ...]
    english: tuple[str, ...]
    chinese: tuple[str, ...]


def _rows(text: str) -> tuple[tuple[str, str, str, str], ...]:
    rows = []
    for line in text.strip().splitlines():
        subject, answer, subject_zh, answer_zh = (cell.strip() for cell in line.split("|"))
        rows.append((subject, answer, subject_zh, answer_zh))
    return tuple(rows)


CAPITALS: Final = Relation(
    facts=_rows("""
        France | Paris | 法国 | 巴黎
        Germany | Berlin | 德国 | 柏林
        Italy | Rome | 意大利 | 罗马
        Spain | Madrid | 西班牙 | 马德里
        Portugal | Lisbon | 葡萄牙 | 里斯本
        China | Beijing | 中国 | 北京
        Japan | Tokyo | 日本 | 东京
        South Korea | Seoul | 韩国 | 首尔
        Thailand | Bangkok | 泰国 | 曼谷
        Vietnam | Hanoi | 越南 | 河内
        Russia | Moscow | 俄罗斯 | 莫斯科
        Egypt | Cairo | 埃及 | 开罗
        Kenya | Nairobi | 肯尼亚 | 内罗毕
        Peru | Lima | 秘鲁 | 利马
        Cuba | Havana | 古巴 | 哈瓦那
        Canada | Ottawa | 加拿大 | 渥太华
        Britain | London | 英国 | 伦敦
        Ireland | Dublin | 爱尔兰 | 都柏林
        Norway | Oslo | 挪威 | 奥斯陆
        Sweden | Stockholm | 瑞典 | 斯德哥尔摩
        Finland | Helsinki | 芬兰 | 赫尔辛基
        Poland | Warsaw | 波兰 | 华沙
        Austria | Vienna | 奥地利 | 维也纳
        Hungary | Budapest | 匈牙利 | 布达佩斯
        Greece | Athens | 希腊 | 雅典
        Belgium | Brussels | 比利时 | 布鲁塞尔
        Turkey | Ankara | 土耳其 | 安卡拉
        Iran | Tehran | 伊朗 | 德黑兰
        India | New Delhi | 印度 | 新德里
        Chile | Santiago | 智利 | 圣地亚哥
    """),
    english=(
        "What is the capital of {}?",
        "Which city is the capital of {}?",
        "Name the capital of {}.",
        "Tell me the capital of {}.",
        "Do you know the capital of {}?",
        "Please give me the capital of {}.",
        "I forgot the capital of {}. What is it?",
        "The capital of {} is which city?",
        "{}: what is its capital?",
        "What is the capital city of {}?",
        "What is {}'s capital?",
        "Can you name the capital of {}?",
        "capital of {}?",
    ),
    chinese=(
        "{}的首都是哪里？",
        "{}的首都是什么？",
        "{}的首都是哪座城市？",
        "请告诉我{}的首都。",
        "你知道{}的首都吗？",
        "哪座城市是{}的首都？",
    ),
)

OPPOSITES: Final = Relation(
    facts=_rows("""
        hot | cold | 热 | 冷
        big | small | 大 | 小
        long | short | 长 | 短
        high | low | 高 | 低
        fast | slow | 快 | 慢
        old | new | 旧 | 新
        early | late | 早 | 晚
        open | closed | 开 | 关
        left | right | 左 | 右
        full | empty | 满 | 空
        rich | poor | 富 | 穷
        hard | soft | 硬 | 软
        thick | thin | 厚 | 薄
        near | far | 近 | 远
        wet | dry | 湿 | 干
    """),
    english=(
        "What is the opposite of {}?",
        "Which word is the opposite of {}?",
        "Name the opposite of {}.",
        "Tell me the opposite of {}.",
        "Do you know the opposite of {}?",
        "Please give me the opposite of {}.",
        "I need the opposite of {}. What is it?",
        "The opposite of {} is which word?",
        "{}: what is its opposite?",
        "What word means the opposite of {}?",
        "Can you name the opposite of {}?",
        "opposite of {}?",
    ),
    chinese=(
        "{}的反义词是什么？",
        "{}的反义词是哪个字？",
        "请告诉我{}的反义词。",
        "你知道{}的反义词吗？",
        "哪个字是{}的反义词？",
        "写出{}的反义词。",
    ),
)

SYMBOLS: Final = Relation(
    facts=_rows("""
        gold | Au | 金 | Au
        silver | Ag | 银 | Ag
        iron | Fe | 铁 | Fe
        copper | Cu | 铜 | Cu
        lead | Pb | 铅 | Pb
        tin | Sn | 锡 | Sn
        zinc | Zn | 锌 | Zn
        mercury | Hg | 汞 | Hg
        sodium | Na | 钠 | Na
        helium | He | 氦 | He
        neon | Ne | 氖 | Ne
        lithium | Li | 锂 | Li
        calcium | Ca | 钙 | Ca
        silicon | Si | 硅 | Si
        chlorine | Cl | 氯 | Cl
    """),
    english=(
        "What is the chemical symbol of {}?",
        "Which letters are the chemical symbol of {}?",
        "Name the chemical symbol of {}.",
        "Tell me the chemical symbol of {}.",
        "Do you know the chemical symbol of {}?",
        "Please give me the chemical symbol of {}.",
        "I forgot the chemical symbol of {}. What is it?",
        "The chemical symbol of {} is what?",
        "{}: what is its chemical symbol?",
        "How do chemists write {}?",
        "Can you name the chemical symbol of {}?",
        "chemical symbol of {}?",
    ),
    chinese=(
        "{}的化学符号是什么？",
        "{}的元素符号是什么？",
        "请告诉我{}的化学符号。",
        "你知道{}的化学符号吗？",
        "{}用什么化学符号表示？",
        "写出{}的化学符号。",
    ),
)

RELATIONS: Final = (CAPITALS, OPPOSITES, SYMBOLS)
