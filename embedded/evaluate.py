"""Measures the checkpoint on unseen problems: `python -m inference_pio.embedded.evaluate`.

Greedy decoding through transformers, in left-padded batches. Besides the plain modes, the soft
switches are measured inside varied conversations: earlier turns, system turns, unneeded tools.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import Qwen3ForCausalLM

from . import checkpoint_path
from .conversation import MODES, Conversation, Mode, plain, varied
from .problem import Problem, is_correct
from .tasks import KINDS, generate
from .tokenizer import END_TOKEN, PAD_TOKEN, token_id

ROWS = 64
LONGEST_COMPLETION = 240
"""Tokens; the longest thought that training shows is 167."""


@dataclass(frozen=True)
class Score:
    """Accuracy of one kind in one mode."""

    kind: str
    mode: str
    problems: int
    right: float
    """Share of right answers, 0 to 1."""

    obeyed: float
    """Share of completions that thought exactly when they should."""

    thought_tokens: float
    """Mean length of the thought, without its tags."""


class Judge:
    """Holds a checkpoint and scores conversations with it."""

    def __init__(self, folder: Path) -> None:
        """Loads the checkpoint. Raises OSError where `folder` holds none."""
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._pad = token_id(self._tokenizer, PAD_TOKEN)
        self._ends = {self._pad, token_id(self._tokenizer, END_TOKEN)}
        self._think_ends = token_id(self._tokenizer, "</think>")
        # transformers types `generate` for a protocol that its own models do not match.
        self._model: Any = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

    def complete(self, conversations: Sequence[Conversation]) -> list[list[int]]:
        """Greedy completions as token ids, without padding and end tokens."""
        prompts = [self._tokenizer.encode(asked.prompt).ids for asked in conversations]
        by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        completions: list[list[int]] = [[] for _ in prompts]
        for start in range(0, len(by_length), ROWS):
            chosen = by_length[start : start + ROWS]
            for index, ids in zip(
                chosen, self._continue([prompts[i] for i in chosen]), strict=True
            ):
                completions[index] = ids
        return completions

    def _continue(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        longest = max(map(len, prompts))
        padded = [[self._pad] * (longest - len(ids)) + ids for ids in prompts]
        mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
        output = self._model.generate(
            input_ids=torch.tensor(padded),
            attention_mask=torch.tensor(mask),
            max_new_tokens=LONGEST_COMPLETION,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
        )
        written: list[list[int]] = output[:, longest:].tolist()
        return [[token for token in ids if token not in self._ends] for ids in written]

    def score(
        self, kind: str, mode: str, problems: Sequence[Problem], asked: Sequence[Conversation]
    ) -> Score:
        """Scores the conversations, each of which asks the problem at the same index."""
        right = obeyed = thought_tokens = 0
        for problem, conversation, ids in zip(problems, asked, self.complete(asked), strict=True):
            text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
            right += is_correct(problem, text)
            ended = ids.index(self._think_ends) if self._think_ends in ids else len(ids)
            # "<think>" and the two line ends are not part of the thought.
            length = max(0, ended - 3) if text.startswith("<think>") else 0
            obeyed += (length > 0) == (conversation.thought is not None)
            thought_tokens += length
        count = len(problems)
        return Score(kind, mode, count, right / count, obeyed / count, thought_tokens / count)


def evaluate(folder: Path, count: int, seed: int) -> list[Score]:
    """Scores of every kind, plainly asked with and without thinking, and in varied talks."""
    judge = Judge(folder)
    scores = []
    for kind in KINDS:
        problems = generate(kind, "test", seed, count)
        for thinking in (True, False):
            asked = [plain(problem, thinking) for problem in problems]
            scores.append(judge.score(kind, "think" if thinking else "off", problems, asked))
    for mode in MODES:
        problems, asked = _talks(mode, count, seed)
        scores.append(judge.score("varied talks", mode, problems, asked))
    return scores


def _talks(mode: Mode, count: int, seed: int) -> tuple[list[Problem], list[Conversation]]:
    """Problems of all kinds; without thinking only of those that need no steps."""
    rng = random.Random(f"talks {mode} {seed}")
    needs_steps = {"arithmetic", "two_numbers", "follow_up", "sort", "count_letters"}
    kinds = [kind for kind in KINDS if mode == "think" or kind not in needs_steps]
    share = -(-count // len(kinds))
    problems = [problem for kind in kinds for problem in generate(kind, "test", seed + 1, share)]
    talks = [varied(problem, mode, "test", rng) for problem in problems]
    # A cut thought leaves no way to the answer, so it would measure nothing.
    return problems, [replace(talk, cut=None) for talk in talks]


def table(scores: Sequence[Score]) -> str:
    """The scores as a Markdown table."""
    lines = [
        "| task | mode | problems | right | mode obeyed | thought tokens |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for score in scores:
        lines.append(
            f"| {score.kind} | {score.mode} | {score.problems} | {score.right:.1%} "
            f"| {score.obeyed:.1%} | {score.thought_tokens:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Reads the command line, prints the table, then the same as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=checkpoint_path())
    parser.add_argument("--count", type=int, default=200, help="problems a task")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the scores to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    begun = time.monotonic()
    scores = evaluate(arguments.checkpoint, arguments.count, arguments.seed)
    print(table(scores))
    rows = [asdict(score) for score in scores]
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(rows))
    print(f"{time.monotonic() - begun:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
