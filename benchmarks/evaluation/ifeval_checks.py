"""Whether a text follows an instruction of IFEval: one function each, all linear in the text.

The definitions are those of the published checks, where these are plain rules. Three use
libraries there; here they are small rules of this project (``prose``, ``language``): sentences,
words in capitals, and the language of a text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from .language import is_in_language
from .prose import count_capital_words, count_sentences

Arguments = Mapping[str, Any]
Check = Callable[[str, Arguments], bool]

CONSTRAINED_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
TITLE_OPEN, TITLE_CLOSE = "<<", ">>"
RESPONSE_SEPARATOR = "******"
_PARAGRAPH_RULE = re.compile(r"\s?\*\*\*\s?")
_HIGHLIGHT = re.compile(r"\*([^\n*]*)\*")
_STRONG_HIGHLIGHT = re.compile(r"\*\*([^\n*]*)\*\*")
_WORD = re.compile(r"\w+")
_FIRST_WORD_ENDS = re.compile(r"[.,?!'\"]")
_FENCE_OPEN = re.compile(r"```(?:json|Json|JSON)?")


def _related(count: int, relation: str, bound: int) -> bool:
    """The two relations of the data: at least so many, or fewer."""
    return count < bound if relation == "less than" else count >= bound


# --- keywords ---------------------------------------------------------------------------------


def existence(text: str, arguments: Arguments) -> bool:
    """Every keyword is there, as part of any word and in any case."""
    lowered = text.lower()
    return all(keyword.lower() in lowered for keyword in arguments["keywords"])


def frequency(text: str, arguments: Arguments) -> bool:
    """A keyword is there so often."""
    count = text.lower().count(arguments["keyword"].lower())
    return _related(count, arguments["relation"], arguments["frequency"])


def forbidden_words(text: str, arguments: Arguments) -> bool:
    """None of the words is there as a whole word."""
    return not any(
        re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE)
        for word in arguments["forbidden_words"]
    )


def letter_frequency(text: str, arguments: Arguments) -> bool:
    """A letter is there so often, in any case."""
    count = text.lower().count(arguments["letter"].lower())
    return _related(count, arguments["let_relation"], arguments["let_frequency"])


# --- language and case ------------------------------------------------------------------------


def response_language(text: str, arguments: Arguments) -> bool:
    """All is in that language."""
    return is_in_language(text, arguments["language"])


def english_capital(text: str, _: Arguments) -> bool:
    """English without a small letter."""
    return text.isupper() and is_in_language(text, "en")


def english_lowercase(text: str, _: Arguments) -> bool:
    """English without a capital."""
    return text.islower() and is_in_language(text, "en")


def capital_word_frequency(text: str, arguments: Arguments) -> bool:
    """So many words are in capitals throughout."""
    count = count_capital_words(text)
    return _related(count, arguments["capital_relation"], arguments["capital_frequency"])


# --- length -----------------------------------------------------------------------------------


def number_sentences(text: str, arguments: Arguments) -> bool:
    """So many sentences."""
    return _related(count_sentences(text), arguments["relation"], arguments["num_sentences"])


def number_words(text: str, arguments: Arguments) -> bool:
    """So many runs of letters, digits and underscores."""
    count = sum(1 for _ in _WORD.finditer(text))
    return _related(count, arguments["relation"], arguments["num_words"])


def number_paragraphs(text: str, arguments: Arguments) -> bool:
    """Exactly so many paragraphs with ``***`` between them; only the ends may be empty."""
    paragraphs = _PARAGRAPH_RULE.split(text)
    if any(not paragraph.strip() for paragraph in paragraphs[1:-1]):
        return False
    filled = sum(1 for paragraph in paragraphs if paragraph.strip())
    return bool(filled == arguments["num_paragraphs"])


def nth_paragraph_first_word(text: str, arguments: Arguments) -> bool:
    """Exactly so many paragraphs with blank lines between, the n-th beginning with that word."""
    paragraphs = text.split("\n\n")
    filled = sum(1 for paragraph in paragraphs if paragraph.strip())
    nth = arguments["nth_paragraph"]
    if filled != arguments["num_paragraphs"] or nth > filled:
        return False
    words = paragraphs[nth - 1].split()
    if not words:
        return False
    found = words[0].lstrip("'").lstrip('"')
    first = _FIRST_WORD_ENDS.split(found)[0].lower()
    return bool(first == arguments["first_word"].lower())


# --- content and format -----------------------------------------------------------------------


def number_placeholders(text: str, arguments: Arguments) -> bool:
    """At least so many ``[placeholders]``, each within a line."""
    count = sum(_count_enclosed(line, "[", "]") for line in text.split("\n"))
    return bool(count >= arguments["num_placeholders"])


def postscript(text: str, arguments: Arguments) -> bool:
    """The marker of a postscript is there; P.S. and P.P.S may have blanks in them."""
    marker = arguments["postscript_marker"]
    patterns = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return bool(re.search(patterns.get(marker, re.escape(marker.lower())), text.lower()))


def number_bullet_lists(text: str, arguments: Arguments) -> bool:
    """Exactly so many bullets: lines that begin with ``-``, or with one ``*`` and more."""
    lines = [line.lstrip() for line in text.split("\n")]
    stars = sum(1 for line in lines if line[:1] == "*" and line[1:2] not in ("", "*"))
    dashes = sum(1 for line in lines if line[:1] == "-")
    return bool(stars + dashes == arguments["num_bullets"])


def constrained_response(text: str, _: Arguments) -> bool:
    """One of the three answers is in it."""
    return any(answer in text for answer in CONSTRAINED_ANSWERS)


def number_highlighted_sections(text: str, arguments: Arguments) -> bool:
    """At least so many ``*highlights*``, of which ``**strong ones**`` count too."""
    single = sum(1 for found in _HIGHLIGHT.finditer(text) if found[1].strip())
    strong = sum(1 for found in _STRONG_HIGHLIGHT.finditer(text) if found[1].strip())
    return bool(single + strong >= arguments["num_highlights"])


def multiple_sections(text: str, arguments: Arguments) -> bool:
    """At least so many sections, each behind the splitter and a number."""
    heading = rf"{re.escape(arguments['section_spliter'])}\s?\d+"
    count = sum(1 for _ in re.finditer(heading, text))
    return bool(count >= arguments["num_sections"])


def json_format(text: str, _: Arguments) -> bool:
    """The whole text is JSON, in a fence or not."""
    inner = text.strip()
    if opening := _FENCE_OPEN.match(inner):
        inner = inner[opening.end() :]
    try:
        json.loads(inner.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def title(text: str, _: Arguments) -> bool:
    """A line has a title in ``<<double angular brackets>>``."""
    return any(_title_of(line) for line in text.split("\n"))


# --- combinations, ends, punctuation ----------------------------------------------------------


def two_responses(text: str, _: Arguments) -> bool:
    """Two different responses with ``******`` between them; only the ends may be empty."""
    parts = text.split(RESPONSE_SEPARATOR)
    if any(not part.strip() for part in parts[1:-1]):
        return False
    filled = [part.strip() for part in parts if part.strip()]
    return len(filled) == 2 and filled[0] != filled[1]


def repeat_prompt(text: str, arguments: Arguments) -> bool:
    """The request is repeated first, word for word but for case."""
    return text.strip().lower().startswith(arguments["prompt_to_repeat"].strip().lower())


def end_checker(text: str, arguments: Arguments) -> bool:
    """The text ends in that phrase, in any case; quotes around the text are left out."""
    phrase: str = arguments["end_phrase"].strip().lower()
    return text.strip().strip('"').lower().endswith(phrase)


def quotation(text: str, _: Arguments) -> bool:
    """The text stands in double quotes."""
    inner = text.strip()
    return len(inner) > 1 and inner[0] == '"' == inner[-1]


def no_comma(text: str, _: Arguments) -> bool:
    """No comma."""
    return "," not in text


CHECKS: dict[str, Check] = {
    "keywords:existence": existence,
    "keywords:frequency": frequency,
    "keywords:forbidden_words": forbidden_words,
    "keywords:letter_frequency": letter_frequency,
    "language:response_language": response_language,
    "length_constraints:number_sentences": number_sentences,
    "length_constraints:number_words": number_words,
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": number_placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": number_bullet_lists,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:number_highlighted_sections": number_highlighted_sections,
    "detectable_format:multiple_sections": multiple_sections,
    "detectable_format:json_format": json_format,
    "detectable_format:title": title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeat_prompt,
    "startend:end_checker": end_checker,
    "startend:quotation": quotation,
    "change_case:capital_word_frequency": capital_word_frequency,
    "change_case:english_capital": english_capital,
    "change_case:english_lowercase": english_lowercase,
    "punctuation:no_comma": no_comma,
}
"""By the name that the data has."""


def _count_enclosed(line: str, opening: str, closing: str) -> int:
    """Pairs of an opening and the next closing mark behind it, one after another."""
    count = end = 0
    while (start := line.find(opening, end)) >= 0 and (end := line.find(closing, start + 1)) >= 0:
        end += len(closing)
        count += 1
    return count


def _title_of(line: str) -> str:
    start, end = line.find(TITLE_OPEN), line.rfind(TITLE_CLOSE)
    return line[start:end].strip("<> ") if 0 <= start < end else ""
