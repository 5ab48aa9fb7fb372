"""Tokenizers for the tests of text: a tiny one made here, and the real ones where data lies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as LibraryTokenizer

from inference_pio.workers.text.tokenizer import Tokenizer

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def write_tokenizer(folder: Path, tags: tuple[str, ...] = TAGS) -> Path:
    """A byte-level BPE tokenizer with a few merges, some across characters, and the given tags."""
    merges = [
        ("h", "e"),
        ("l", "l"),
        ("he", "ll"),
        ("hell", "o"),
        ("Ċ", "Ċ"),
        ("ð", "Ł"),
        ("Ġ", "Ġ"),
    ]
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    vocab = {name: number for number, name in enumerate(names)}
    tokenizer = LibraryTokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s+|\S+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in SPECIAL]
    )
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in tags])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> Tokenizer:
    """A tokenizer of 256 bytes, a few words and all control tokens."""
    return Tokenizer.load(tiny_folder)


@pytest.fixture(scope="session")
def tagless(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The same without think and tool tags."""
    return Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("tagless"), tags=()))


@pytest.fixture(scope="session")
def qwen(data_dir: Path) -> Tokenizer:
    """The real tokenizer of Qwen3-0.6B."""
    return Tokenizer.load(data_dir / "hf-qwen3-0.6b")
