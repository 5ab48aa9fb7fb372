from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as LibraryTokenizer

from inference_pio.workers.text.errors import TextFilesError
from inference_pio.workers.text.tokenizer import STOP_TEXT, Tokenizer
from inference_pio.workers.types import RequestError

from .conftest import SPECIAL, TAGS, write_tokenizer

quiet = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
WITH_CONTROL = st.lists(TEXT | st.sampled_from([*SPECIAL, *TAGS]), max_size=6).map("".join)


def library(folder: Path) -> LibraryTokenizer:
    return LibraryTokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("name", ["vectors_llamacpp_qwen2.json", "vectors_transformers_qwen2.json"])
def test_real_vectors(data_dir: Path, qwen: Tokenizer, name: str) -> None:
    vectors = json.loads((data_dir / name).read_text())
    assert vectors
    for vector in vectors:
        assert qwen.encode(vector["text"]) == vector["ids"], vector["text"]


def test_real_special_ids(qwen: Tokenizer) -> None:
    assert qwen.num_tokens == 151_669
    assert qwen.longest_token_bytes == 128
    tags = qwen.tags
    assert (tags.think_open, tags.think_close) == (151667, 151668)
    assert (tags.tool_open, tags.tool_close) == (151657, 151658)
    assert tags.eos == qwen.eos == 151645
    # Visible in decoded text: the think and tool tags are not special, the turn markers are.
    assert {151643, 151644, 151645} <= qwen.special_ids
    assert not {151657, 151658, 151665, 151666, 151667, 151668} & qwen.special_ids
    assert 271 in tags.whitespace
    assert qwen.encode("x")[0] not in tags.whitespace


def test_forced_closing_holds_the_control_id(qwen: Tokenizer) -> None:
    stop = qwen.tags.stop_text_ids
    assert qwen.decode(stop) == f"\n\n{STOP_TEXT}\n</think>\n\n"
    assert stop.count(151668) == 1
    assert stop[-1] == 271


def test_tokenizer_without_tags(tagless: Tokenizer) -> None:
    tags = tagless.tags
    assert (tags.think_open, tags.think_close, tags.tool_open, tags.tool_close) == (None,) * 4
    assert tags.stop_text_ids == ()
    text = "<think>hello</think>"
    assert tagless.decode(tagless.encode(text, parse_special=True)) == text


@quiet
@given(text=WITH_CONTROL)
def test_parse_special_equals_the_full_tokenizer(
    tiny: Tokenizer, tiny_folder: Path, text: str
) -> None:
    full = library(tiny_folder).encode(text, add_special_tokens=False).ids
    assert tiny.encode(text, parse_special=True) == full


def test_of_two_control_tokens_the_longer_is_taken(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, tags=("<a", "<a>", "<a>b"))
    text = "<a<a>b<a>c<a"
    full = library(folder).encode(text, add_special_tokens=False).ids
    assert Tokenizer.load(folder).encode(text, parse_special=True) == full


@quiet
@given(text=WITH_CONTROL)
@example(text="<|im_start|>system\n</think>")
@example(text="a\0b")
def test_plain_encoding_keeps_the_text_and_uses_no_control_id(tiny: Tokenizer, text: str) -> None:
    ids = tiny.encode(text)
    assert not set(ids) & set(tiny.control.values())
    assert tiny.decode(ids) == text


@quiet
@given(data=st.data())
def test_decode_equals_the_library(tiny: Tokenizer, tiny_folder: Path, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tiny.num_tokens - 1), max_size=40))
    full = library(tiny_folder)
    for skip in (True, False):
        assert tiny.decode(ids, skip_special=skip) == full.decode(ids, skip_special_tokens=skip)


def test_real_plain_and_full_encoding_agree_without_control_tokens(
    data_dir: Path, qwen: Tokenizer
) -> None:
    full = library(data_dir / "hf-qwen3-0.6b")
    text = "한국어 e\u0301 ﬁ 👨‍👩‍👧 <think x <|im_star |>  \r\n\t\u3000 don't 12345 \x00\x7f"
    assert qwen.encode(text) == full.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("text", ["\ud800", "ok \udfff", "é\udc00x"])
def test_lone_surrogates_are_refused(tiny: Tokenizer, text: str) -> None:
    with pytest.raises(RequestError, match="lone surrogate") as refused:
        tiny.encode(text, param="messages[0].content")
    assert refused.value.param == "messages[0].content"


def test_token_limit_is_exact(tiny: Tokenizer) -> None:
    ids = tiny.encode("hello " * 50)
    assert tiny.encode("hello " * 50, max_tokens=len(ids)) == ids
    with pytest.raises(RequestError) as refused:
        tiny.encode("hello " * 50, max_tokens=len(ids) - 1)
    assert refused.value.code == "context_length_exceeded"


def test_control_ids_count_towards_the_limit(tiny: Tokenizer) -> None:
    with pytest.raises(RequestError, match="3 tokens"):
        tiny.encode("<think>" * 4, parse_special=True, max_tokens=3)


def test_only_the_beginning_of_a_far_too_long_text_is_encoded(qwen: Tokenizer) -> None:
    seen: list[int] = []

    class Counting:
        def encode(self, text: str, *, add_special_tokens: bool) -> object:
            seen.append(len(text))
            return plain.encode(text, add_special_tokens=add_special_tokens)

    plain = qwen._plain
    counted = Tokenizer(
        Counting(),  # type: ignore[arg-type]
        qwen._bytes,
        qwen.control,
        qwen.special_ids,
        qwen.eos,
    )
    seen.clear()
    with pytest.raises(RequestError) as refused:
        counted.encode("🦙" * 2_500_000, max_tokens=1000)
    assert refused.value.code == "context_length_exceeded"
    assert sum(seen) < 10_000


def test_a_giant_run_of_whitespace_is_refused(qwen: Tokenizer) -> None:
    # The library panics on it.
    with pytest.raises(RequestError, match="whitespace characters in a row"):
        qwen.encode(" " * 10_000_000)
    assert len(qwen.encode(" " * 100_000)) == 782


@pytest.mark.parametrize("token", [-1, 10**9])
def test_unknown_ids_are_refused(tiny: Tokenizer, token: int) -> None:
    with pytest.raises(RequestError, match="outside the vocabulary"):
        tiny.decode([token])
    with pytest.raises(RequestError, match="outside the vocabulary"):
        tiny.token_bytes(token)


def broken(folder: Path, change: str) -> None:
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text())
    if change == "missing":
        path.unlink()
        return
    if change == "truncated":
        path.write_text(path.read_text()[:500])
        return
    if change == "model":
        document["model"] = {"type": "Unigram"}
    elif change == "decoder":
        document["decoder"] = None
    elif change == "list":
        document = []
    elif change == "lstrip":
        document["added_tokens"][0]["lstrip"] = True
    elif change == "gap":
        document["added_tokens"][-1]["id"] += 7
    elif change == "spelling":
        document["model"]["vocab"]["日"] = document["model"]["vocab"].pop("A")
    elif change == "merges":
        document["model"]["merges"] = [["never", "there"]]
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("missing", "does not exist"),
        ("truncated", "cannot be read as JSON"),
        ("list", "not a JSON object"),
        ("model", "only BPE"),
        ("decoder", "not ByteLevel"),
        ("lstrip", "lstrip"),
        ("gap", "gapless"),
        ("spelling", "spelled with"),
        ("merges", "tokenizer.json"),
    ],
)
def test_unusable_files_are_refused_with_the_reason(
    tmp_path: Path, change: str, reason: str
) -> None:
    folder = write_tokenizer(tmp_path)
    broken(folder, change)
    with pytest.raises(TextFilesError, match=reason):
        Tokenizer.load(folder)


def test_control_tokens_listed_only_in_the_settings(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, tags=())
    number = Tokenizer.load(folder).num_tokens
    settings_path = folder / "tokenizer_config.json"
    document = json.loads(settings_path.read_text())
    entry = {"content": "<think>", "special": False}
    document["added_tokens_decoder"] = {str(number): entry}
    settings_path.write_text(json.dumps(document))
    assert Tokenizer.load(folder).tags.think_open == number


def test_importing_text_loads_neither_torch_nor_transformers() -> None:
    program = (
        "import sys\n"
        "import inference_pio.workers.text.assembler\n"
        "import inference_pio.workers.text.messages\n"
        "import inference_pio.workers.text.template\n"
        "print([name for name in ('torch', 'transformers', 'ray') if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
