"""Endless training batches: a mixture of tasks and modes, sorted into rows of like length."""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from .conversation import Mode, varied
from .tasks import draw
from .tokenizer import PAD_TOKEN, token_id

IGNORED = -100
"""Label of a position without a loss."""


@dataclass(frozen=True)
class Mixture:
    """How often each mode and each kind is drawn; the shares need not add up to one."""

    modes: dict[Mode, float]
    thinking: dict[str, float]
    answering: dict[str, float]


MAIN_MIXTURE = Mixture(
    modes={"think": 0.45, "switched_off": 0.2, "off": 0.35},
    thinking={
        "arithmetic": 8.0,
        "two_numbers": 1.0,
        "follow_up": 1.5,
        "sort": 3.5,
        "count_letters": 1.5,
        "reverse_word": 1.0,
        "small_sum": 0.5,
        "compare": 1.2,
        "reverse_short": 0.5,
        "copy": 0.5,
        "tool_call": 0.7,
        "tool_answer": 0.7,
        "no_tool": 0.3,
        "about": 0.3,
    },
    answering={
        "arithmetic": 0.3,
        "two_numbers": 0.4,
        "follow_up": 0.3,
        "sort": 0.5,
        "count_letters": 0.7,
        "reverse_word": 1.0,
        "small_sum": 4.0,
        "compare": 4.0,
        "reverse_short": 3.0,
        "copy": 3.0,
        "tool_call": 1.0,
        "tool_answer": 1.0,
        "no_tool": 0.4,
        "about": 0.4,
    },
)

FINISHING_MIXTURE = Mixture(
    modes={"think": 0.35, "switched_off": 0.2, "off": 0.45},
    thinking={
        "arithmetic": 6.0,
        "two_numbers": 1.0,
        "follow_up": 2.0,
        "sort": 4.0,
        "count_letters": 2.0,
        "reverse_word": 1.2,
        "small_sum": 0.3,
        "compare": 1.5,
        "reverse_short": 0.6,
        "copy": 0.4,
        "tool_call": 0.4,
        "tool_answer": 0.6,
        "no_tool": 0.2,
        "about": 0.2,
    },
    answering={
        "arithmetic": 0.1,
        "two_numbers": 0.1,
        "follow_up": 0.1,
        "sort": 0.1,
        "count_letters": 1.0,
        "reverse_word": 0.5,
        "small_sum": 8.0,
        "compare": 8.0,
        "reverse_short": 2.5,
        "copy": 2.0,
        "tool_call": 0.6,
        "tool_answer": 1.0,
        "no_tool": 0.3,
        "about": 0.3,
    },
)
"""More of what is learned last: sums and comparisons without a thought, sorting, counting."""

POLISHING_MIXTURE = Mixture(
    modes={"think": 0.4, "switched_off": 0.2, "off": 0.4},
    thinking={
        "arithmetic": 4.0,
        "two_numbers": 0.7,
        "follow_up": 1.5,
        "sort": 6.0,
        "count_letters": 1.5,
        "reverse_word": 1.0,
        "small_sum": 0.3,
        "compare": 4.0,
        "reverse_short": 0.5,
        "copy": 0.4,
        "tool_call": 0.4,
        "tool_answer": 0.6,
        "no_tool": 0.2,
        "about": 0.2,
    },
    answering={
        "count_letters": 0.5,
        "reverse_word": 0.5,
        "small_sum": 8.0,
        "compare": 8.0,
        "reverse_short": 1.0,
        "copy": 2.0,
        "tool_call": 0.6,
        "tool_answer": 0.8,
        "no_tool": 0.3,
        "about": 0.3,
        "arithmetic": 0.1,
        "two_numbers": 0.1,
        "follow_up": 0.1,
        "sort": 0.1,
    },
)
"""Mostly the three tasks that are still weak after the first stage."""

POOL = 48
"""Batches that are sorted together: enough for rows of like length, few enough to stay mixed."""

ROW_MULTIPLE = 8
LONGEST_ROW = 1536
"""Longer rows are left out; they come from long system turns only."""


@dataclass(frozen=True)
class Batch:
    """Token ids and labels, both (rows, length) int64; labels are IGNORED outside completions.

    `weights` (rows, 1) float32 falls with the square root of a completion's length, or else the
    many tokens of the thoughts would drown the few of the short answers.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True)
class _Row:
    ids: list[int]
    prompt_length: int


def training_batches(
    tokenizer: Tokenizer, mixtures: Mapping[int, Mixture], seed: int, tokens: int
) -> Iterator[Batch]:
    """Batches of about `tokens` tokens, padding included; the same for the same seed.

    A mixture holds from its number of batches on, rounded up to a whole pool.
    """
    rng = random.Random(seed)
    pad = token_id(tokenizer, PAD_TOKEN)
    cut = 0
    while True:
        mixture = mixtures[max(start for start in mixtures if start <= cut)]
        rows: list[_Row] = []
        pooled = 0
        while pooled < POOL * tokens:
            drawn = _rows(tokenizer, mixture, rng, 64)
            pooled += sum(len(row.ids) for row in drawn)
            rows += drawn
        rows.sort(key=lambda row: len(row.ids))
        batches = list(_cut(rows, tokens))
        cut += len(batches)
        rng.shuffle(batches)
        for batch in batches:
            yield _padded(batch, pad)


def _rows(tokenizer: Tokenizer, mixture: Mixture, rng: random.Random, count: int) -> list[_Row]:
    texts: list[str] = []
    for _ in range(count):
        mode = rng.choices(list(mixture.modes), list(mixture.modes.values()))[0]
        shares = mixture.thinking if mode == "think" else mixture.answering
        kind = rng.choices(list(shares), list(shares.values()))[0]
        conversation = varied(draw(kind, "train", rng), mode, "train", rng)
        texts += [conversation.prompt, conversation.completion]
    encoded = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts)]
    rows = [
        _Row(prompt + completion, len(prompt))
        for prompt, completion in zip(encoded[::2], encoded[1::2], strict=True)
    ]
    return [row for row in rows if len(row.ids) <= LONGEST_ROW]


def _cut(rows: list[_Row], tokens: int) -> Iterator[list[_Row]]:
    """Cuts rows sorted by length into runs whose padded size stays within `tokens`."""
    batch: list[_Row] = []
    for row in rows:
        if batch and (len(batch) + 1) * len(row.ids) > tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _padded(rows: list[_Row], pad: int) -> Batch:
    longest = max(len(row.ids) for row in rows)
    length = -(-longest // ROW_MULTIPLE) * ROW_MULTIPLE
    ids = torch.full((len(rows), length), pad)
    labels = torch.full((len(rows), length), IGNORED)
    for index, row in enumerate(rows):
        end = len(row.ids)
        ids[index, :end] = torch.tensor(row.ids)
        labels[index, row.prompt_length : end] = ids[index, row.prompt_length : end]
    lengths = (labels != IGNORED).sum(dim=1, keepdim=True)
    return Batch(ids, labels, lengths.float().rsqrt())
