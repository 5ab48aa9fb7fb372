from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from inference_pio.workers.text.detokenizer import Detokenizer
from inference_pio.workers.text.tokenizer import Tokenizer

FAMILY = "👨‍👩‍👧 한 日本 ÿ"


def pieces(tokenizer: Tokenizer, parts: list[list[int]]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.feed(part) for part in parts), detokenizer.flush()]


def byte_ids(tokenizer: Tokenizer, data: bytes) -> list[int]:
    single = {tokenizer.token_bytes(i): i for i in range(256)}
    return [single[bytes([byte])] for byte in data]


def test_every_byte_position(tiny: Tokenizer) -> None:
    ids = byte_ids(tiny, FAMILY.encode())
    for cut in range(len(ids) + 1):
        first, second, rest = pieces(tiny, [ids[:cut], ids[cut:]])
        assert first + second == FAMILY
        assert rest == ""
        assert "\ufffd" not in first


def test_a_character_comes_with_its_last_byte(tiny: Tokenizer) -> None:
    ids = byte_ids(tiny, "🦙".encode())
    assert pieces(tiny, [[i] for i in ids]) == ["", "", "", "🦙", ""]


def test_real_emoji_in_several_tokens(qwen: Tokenizer) -> None:
    ids = qwen.encode(FAMILY)
    assert len(ids) > 10
    parts = pieces(qwen, [[i] for i in ids])
    assert "".join(parts) == FAMILY
    assert not any("\ufffd" in part for part in parts)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_ids_in_any_parts_equal_the_whole(tiny: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tiny.num_tokens - 1), max_size=30))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=5)))
    parts = [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
    assert "".join(pieces(tiny, parts)) == tiny.decode(ids)


def test_flush_begins_anew(tiny: Tokenizer) -> None:
    detokenizer = Detokenizer(tiny)
    half = byte_ids(tiny, "é".encode())[:1]
    assert detokenizer.feed(half) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.feed(tiny.encode("x")) == "x"
