"""Published word lists the tiny family's tasks draw from.

Names and cities are single ASCII words, so that a tokenizer can hold each in a piece or two. The sentence
words are pairwise distinct across their lists: a sentence never holds one word twice.
"""

from __future__ import annotations

from typing import Final


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES: Final = _words("""
    Ada Adam Agnes Alice Amir Amy Ana Andrea Anton Arthur Astrid Aya Bella Ben Bruno Carla Carlos Chen
    Clara Daniel Daria David Diana Diego Dora Edith Elena Elias Ella Emil Emma Erik Esther Eva Felix Fiona
    Frank Freya George Grace Greta Hana Hannah Hassan Helen Hugo Ida Igor Ines Ingrid Ivan Jack Jana Jonas
    Julia Kai Karim Kate Kenji Lara Laura Leila Lena Leo Lin Lisa Lucas Lucy Maria Mark Marta Max Mei Mia
    Milo Mina Nadia Nina Noah Nora Olga Oliver Omar Oscar Paul Pedro Peter Petra Priya Rafael Ravi Rosa
    Ruth Sami Sara Simon Sonia Stella Tara Theo Thomas Tom Vera Victor Wei Yuki Zara Zoe
""")

CITIES: Final = _words("""
    Accra Amman Amsterdam Ankara Athens Atlanta Auckland Austin Baghdad Baku Bangkok Barcelona Beijing
    Beirut Belgrade Bergen Berlin Bern Bogota Bonn Boston Brisbane Brussels Bucharest Budapest Busan Cairo
    Calgary Caracas Chengdu Chicago Cologne Dakar Dallas Delhi Denver Dhaka Doha Dubai Dublin Florence
    Geneva Genoa Ghent Hamburg Hanoi Harbin Havana Helsinki Houston Istanbul Jakarta Kabul Kiev Krakow
    Kyoto Lagos Lahore Leeds Leipzig Lima Lisbon Liverpool London Lyon Madrid Malaga Manila Marseille
    Melbourne Miami Milan Minsk Montreal Moscow Mumbai Munich Nairobi Naples Nice Osaka Oslo Ottawa Oxford
    Palermo Paris Perth Porto Prague Quito Riga Rome Santiago Seattle Seoul Seville Shanghai Singapore
    Sofia Stockholm Sydney Tallinn Tehran Tokyo Toronto Tunis Turin Valencia Vienna Vilnius Warsaw
    Wellington Wuhan Zagreb Zurich
""")

COLOURS: Final = _words("red blue green yellow orange purple brown black white grey pink gold")
COLOURS_ZH: Final = _words("红色 蓝色 绿色 黄色 橙色 紫色 棕色 黑色 白色 灰色 粉色 金色")
PETS: Final = _words("cat dog rabbit parrot hamster turtle goldfish pony lizard canary ferret snake")
PETS_ZH: Final = _words("猫 狗 兔子 鹦鹉 仓鼠 乌龟 金鱼 小马 蜥蜴 金丝雀 雪貂 蛇")
FOODS: Final = _words("rice bread soup pasta pizza salad cheese noodles curry sushi dumplings pancakes")
FOODS_ZH: Final = _words("米饭 面包 汤 意面 披萨 沙拉 奶酪 面条 咖喱 寿司 饺子 煎饼")
WEATHERS: Final = _words("sunny cloudy rainy windy foggy snowy stormy clear")

STARTERS: Final = _words("Two Three Four Five Six Seven Eight Nine Ten Some Many Most Several")

ADJECTIVES: Final = _words("""
    old young small large quiet loud happy sad clever brave careful lazy gentle honest proud polite bright
    dark cold warm fresh dry wet heavy light round square narrow wide tall short thin thick clean dusty
    broken empty full cheap expensive famous hidden secret simple strange sweet bitter golden silver
    wooden plastic modern ancient foreign local distant hungry tired patient curious nervous friendly
""")

NOUNS: Final = _words("""
    farmers painters teachers doctors sailors bakers drivers pilots singers dancers writers students
    children neighbours visitors soldiers hunters builders lawyers nurses tigers lions horses monkeys
    foxes wolves sheep goats ducks eagles spiders whales baskets boxes bottles letters books pictures
    candles lamps tables chairs mirrors blankets ropes hammers buckets wheels engines radios cameras
    apples lemons carrots onions potatoes cookies cakes flowers trees stones rivers lakes mountains
    islands forests gardens bridges towers castles houses schools markets stations harbours villages
    streets roads fields deserts beaches caves windows doors walls roofs
""")

VERBS: Final = _words("""
    carried found painted moved watched followed cleaned collected repaired sold bought borrowed lifted
    dropped pushed pulled washed opened closed counted measured guarded visited ignored admired described
    photographed covered decorated protected remembered forgot discovered delivered hid gathered inspected
    shared
""")

ADVERBS: Final = _words("""
    slowly quickly quietly loudly happily sadly carefully gently proudly politely secretly suddenly calmly
    bravely often rarely never always eagerly patiently
""")

PREPOSITIONS: Final = _words("near behind under beside inside outside above below beyond around")

CONNECTORS: Final = _words("while because and but although after before until when so")
