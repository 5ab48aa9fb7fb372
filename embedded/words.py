"""Words for the letter tasks: everyday ones, and invented ones that can be pronounced."""

import random

_EVERYDAY = """
apple arrow autumn badger ball banana basket beach bee bell berry bird blossom blue boat book
bottle bread brick bridge bubble butter button cabbage cake candle carpet carrot castle cat cherry
chess circle city cloud coffee cookie copper corn cotton cow cup daisy dance desk dinner dog
dollar door dragon drum duck eagle ear egg elbow engine falcon farm feather fern field fire fish
flower forest fox frog garden giraffe glass goat gold goose grape grass green guitar hammer hand
hat hello hen hill honey horse house ice igloo island jacket jar jelly jungle kettle key kitten
ladder lake lamp leaf lemon letter level lion lizard llama map maple marble meadow melon mirror
moon mouse museum needle nest noon ocean olive onion orange orchid otter oven owl paper parrot
peach pebble pencil pepper piano pillow pizza planet plum pocket pond potato pumpkin puppy purple
queen rabbit radio rain raven river robot rocket rose saddle salad school shadow sheep ship silver
sky snow spider spoon spring square star stone strawberry street summer sun table tea tiger tomato
tooth tower tree tunnel turtle umbrella valley village violin walnut water wheel whistle willow
window winter wolf wood word world yellow zebra
"""
EVERYDAY_WORDS = tuple(_EVERYDAY.split())

_ONSETS = (*"bcdfghjklmnprstvwz", "bl", "br", "ch", "cl", "dr", "fl", "gr", "pl", "sh", "st", "tr")
_VOWELS = (*"aaeeiioouu", "ai", "ea", "ee", "oo", "ou")
_CODAS = ("", "", "", "n", "r", "l", "s", "t", "m", "ll", "ss", "nd")
_SCRIPTS = ((0xC0, 0xFF), (0x391, 0x3C9), (0x410, 0x44F), (0x3042, 0x3093), (0x4E00, 0x9FA5))
_EMOJI = (0x1F600, 0x1F64F)


def invented_word(rng: random.Random, length: int) -> str:
    """A made-up word of syllables, cut to `length` letters."""
    word = ""
    while len(word) < length:
        word += rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS)
    return word[:length]


def any_word(rng: random.Random, shortest: int, longest: int) -> str:
    """A word of `shortest` to `longest` letters: everyday, invented, or just random letters."""
    choice = rng.random()
    if choice < 0.3:
        word = rng.choice(EVERYDAY_WORDS)
        if shortest <= len(word) <= longest:
            return word
    length = rng.randint(shortest, longest)
    if choice < 0.8:
        return invented_word(rng, length)
    return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=length))


def foreign_word(rng: random.Random) -> str:
    """One to three characters outside ASCII, each of which takes two to four byte tokens."""
    if rng.random() < 0.3:
        return chr(rng.randint(*_EMOJI))
    script = rng.choice(_SCRIPTS)
    return "".join(chr(rng.randint(*script)) for _ in range(rng.randint(1, 3)))
