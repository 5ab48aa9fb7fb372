"""The tokenizer: one token a byte, one a common word, one a special tag.

It is a byte-level BPE tokenizer without merges: a piece of text that is a token as a whole
becomes that token, and every other piece becomes its bytes. So no text is out of vocabulary, and
words that have to be spelled are letters from the start.
"""

from collections.abc import Iterator

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from . import wordings

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Left out of decoded text, as in Qwen3."""

TAG_TOKENS = (
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)
"""Kept in decoded text, as in Qwen3."""

PAD_TOKEN = "<|endoftext|>"
END_TOKEN = "<|im_end|>"

VOCAB_MULTIPLE = 64
"""The model has rows up to a multiple of this, as real checkpoints do; no token has the last."""

_PIECE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen cuts text into pieces; digits stand alone."""

_FIXED_TEXT = (
    "system\nuser\nassistant\ntool\n",
    "\n\n",
    " /no_think\n/no_think /nothink\n/nothink /think\n/think",
    "1 + 1 - 1 * 1 / 1 plus 1 minus 1+1-1, 1 and 1: 1",
    "# Tools\n\nYou may call these functions:\n<tools>\n",
    "\n</tools>\n\nWrite each call as JSON:\n<tool_call>\n",
    '{"name": <name>, "arguments": <arguments>}\n</tool_call>',
    '{"name": "calculator", "arguments": {"expression": "1 * 1"}}\n</tool_call>',
    '{"type": "function", "function": {"name": "calculator", "description": "A.", "parameters": ',
    '{"type": "object", "properties": {"expression": {"type": "string", "description": "A."}}, ',
    '"required": ["expression"]}}}\n{"type": "function", "properties": {"expression": ',
    '{"type": "string"}}, "required": ["city"]}}}\n"required": ["query"]}}}\n',
    '{"city": {"query": {"location": ["location"] {"result": 1}\n',
)


def _pieces() -> Iterator[str]:
    """Pieces of the prompt format and of the wordings, in byte-level spelling, with repeats."""
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECE), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    filled = (
        sentence.format(e=1, n=1, list=1, a=1, b=1, c=1, w=1, t=1)
        for sentence in wordings.all_sentences()
    )
    for text in (*_FIXED_TEXT, *filled):
        for piece, _ in splitter.pre_tokenize_str(text):
            yield piece


def build_tokenizer() -> Tokenizer:
    """The tokenizer: bytes first, then words in order of appearance, then the special tags."""
    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    names += [piece for piece in dict.fromkeys(_pieces()) if len(piece) > 1]
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECE), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS]
    )
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in TAG_TOKENS])
    return tokenizer


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """Number of a token that has to exist. Raises KeyError otherwise."""
    number: int | None = tokenizer.token_to_id(token)
    if number is None:
        raise KeyError(token)
    return number


def padded_vocab_size(token_count: int) -> int:
    """Rows of the embedding for `token_count` tokens: at least one row has no token."""
    return (token_count // VOCAB_MULTIPLE + 1) * VOCAB_MULTIPLE
