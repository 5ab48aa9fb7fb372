from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from inference_pio.workers.text.pieces import Piece, PieceStream
from inference_pio.workers.text.stops import StopMatcher
from inference_pio.workers.text.tokenizer import Tokenizer
from inference_pio.workers.types import TokenKind

TEXT = st.text("ab<", max_size=24)
STOPS = st.lists(st.text("ab<", min_size=1, max_size=5), max_size=4)


def first_end(text: str, stops: list[str]) -> tuple[int, str] | None:
    """Brute force: the first position at which a stop string ends, and the longest such."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return end, max(ending, key=len)
    return None


def longest_beginning(text: str, stops: list[str]) -> int:
    return max(
        (n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n]) and n),
        default=0,
    )


@settings(max_examples=400, deadline=None)
@given(text=TEXT, stops=STOPS, cuts=st.lists(st.integers(0, 24), max_size=4))
@example(text="aab", stops=["ab", "aaa"], cuts=[])
@example(text="aabaaabaaa<", stops=["aabaaa<"], cuts=[])
@example(text="abababb", stops=["ababb"], cuts=[4])
@example(text="ab<a", stops=["b", "ab"], cuts=[1])
def test_matcher_equals_brute_force(text: str, stops: list[str], cuts: list[int]) -> None:
    matcher = StopMatcher(stops)
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    for start, end in itertools.pairwise(borders):
        found = matcher.feed(text[start:end])
        right = first_end(text[:end], stops)
        if right is not None:
            assert found == right[0] - start
            assert matcher.matched == right[1]
            assert matcher.feed("ab<") is None
            return
        assert found is None
        assert matcher.matched is None
        assert matcher.held == longest_beginning(text[:end], stops)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopMatcher(["a", ""])


def texts(stream: PieceStream, ids: list[int], kind: TokenKind = TokenKind.CONTENT) -> list[str]:
    return ["".join(piece.text for piece in stream.feed(i, kind)) for i in ids]


def test_what_may_become_a_stop_string_is_held_back(tiny: Tokenizer) -> None:
    stream = PieceStream(tiny, ("b--",))
    assert texts(stream, tiny.encode("ab-c b--d")) == [
        "a", "", "", "b-c", " ", "", "", "", ""
    ]  # fmt: skip
    assert stream.matched == "b--"
    assert stream.flush() == []


def test_held_text_comes_at_the_end(tiny: Tokenizer) -> None:
    stream = PieceStream(tiny, ("xyz",))
    assert texts(stream, tiny.encode("axy")) == ["a", "", ""]
    assert stream.flush() == [Piece(TokenKind.CONTENT, "x"), Piece(TokenKind.CONTENT, "y")]
    assert stream.matched is None


def test_the_stop_string_may_be_kept(tiny: Tokenizer) -> None:
    stream = PieceStream(tiny, ("xyz",), include_stop=True)
    assert texts(stream, tiny.encode("axyzb")) == ["a", "", "", "xyz", ""]


def test_stop_inside_one_token(tiny: Tokenizer) -> None:
    hello = tiny.encode("hello")
    assert len(hello) == 1
    stream = PieceStream(tiny, ("ll",))
    assert texts(stream, hello) == ["he"]
    assert stream.matched == "ll"


@pytest.mark.parametrize(
    ("min_tokens", "kept"),
    [(0, "a"), (2, "a"), (3, "axya"), (6, "axyaxya"), (8, "axyaxya"), (9, "axyaxyaxyb")],
)
def test_stop_strings_within_the_minimum_are_passed_over(
    tiny: Tokenizer, min_tokens: int, kept: str
) -> None:
    # One token a character: "xy" ends at tokens 3, 6 and 9.
    ids = tiny.encode("axyaxyaxyb")
    stream = PieceStream(tiny, ("xy",), min_tokens=min_tokens)
    assert "".join(texts(stream, ids)) == kept
    assert stream.matched == (None if kept.endswith("b") else "xy")


def test_a_passed_over_stop_string_may_begin_the_next(tiny: Tokenizer) -> None:
    stream = PieceStream(tiny, ("xax",), min_tokens=3)
    assert "".join(texts(stream, tiny.encode("xaxaxb"))) == "xa"
    assert stream.matched == "xax"


def feed_all(stream: PieceStream, tokens: list[tuple[int, TokenKind]]) -> list[Piece]:
    done = [piece for token, kind in tokens for piece in stream.feed(token, kind)]
    return done + stream.flush()


def thinking(tokenizer: Tokenizer, thought: str, answer: str) -> list[tuple[int, TokenKind]]:
    tags = tokenizer.tags
    assert tags.think_open is not None
    assert tags.think_close is not None
    return [
        (tags.think_open, TokenKind.TAG),
        *((i, TokenKind.THOUGHT) for i in tokenizer.encode(thought)),
        (tags.think_close, TokenKind.TAG),
        *((i, TokenKind.CONTENT) for i in tokenizer.encode(answer)),
    ]


def test_thoughts_are_not_searched_unless_asked(tiny: Tokenizer) -> None:
    tokens = thinking(tiny, "a stop b", "c stop d")
    answer_only = PieceStream(tiny, ("stop",))
    assert "".join(p.text for p in feed_all(answer_only, tokens)) == "<think>a stop b</think>c "
    everywhere = PieceStream(tiny, ("stop",), everywhere=True)
    assert "".join(p.text for p in feed_all(everywhere, tokens)) == "<think>a "


def test_a_stop_string_does_not_join_text_across_a_thought(tiny: Tokenizer) -> None:
    stream = PieceStream(tiny, ("\nok",))
    tokens = [(tiny.encode("\n")[0], TokenKind.CONTENT), *thinking(tiny, "t", "ok")]
    assert "".join(p.text for p in feed_all(stream, tokens)) == "\n<think>t</think>ok"
    assert stream.matched is None


def test_a_tag_is_held_back_as_a_whole(tiny: Tokenizer) -> None:
    stream = PieceStream(tiny, ("nk>x",), everywhere=True)
    close = tiny.tags.think_close
    assert close is not None
    assert stream.feed(close, TokenKind.TAG) == []
    pieces = stream.feed(tiny.encode("y")[0], TokenKind.CONTENT)
    assert pieces == [Piece(TokenKind.TAG, "</think>", close), Piece(TokenKind.CONTENT, "y")]


@pytest.mark.parametrize(("stop", "kept"), [("k>x", "</thin"), ("</think>", ""), ("think", "</")])
def test_a_stop_string_may_cut_a_tag(tiny: Tokenizer, stop: str, kept: str) -> None:
    stream = PieceStream(tiny, (stop,), everywhere=True)
    close = tiny.tags.think_close
    assert close is not None
    pieces = feed_all(stream, [(close, TokenKind.TAG), (tiny.encode("x")[0], TokenKind.CONTENT)])
    assert "".join(piece.text for piece in pieces) == kept
    assert all(piece.tag is None for piece in pieces)
    assert stream.matched == stop


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_everywhere_equals_the_whole_text_cut_once(tiny: Tokenizer, data: st.DataObject) -> None:
    thought = data.draw(TEXT)
    answer = data.draw(TEXT)
    stops = data.draw(STOPS)
    include = data.draw(st.booleans())
    stream = PieceStream(tiny, tuple(stops), everywhere=True, include_stop=include)
    pieces = feed_all(stream, thinking(tiny, thought, answer))
    whole = f"<think>{thought}</think>{answer}"
    found = first_end(whole, stops)
    if found is None:
        assert "".join(piece.text for piece in pieces) == whole
    else:
        end, stop = found
        assert stream.matched == stop
        assert "".join(p.text for p in pieces) == whole[: end if include else end - len(stop)]
