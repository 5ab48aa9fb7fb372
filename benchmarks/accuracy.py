"""How often the embedded model is right on unseen problems, with and without thinking."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from ..embedded.problem import Problem, is_correct
from ..embedded.tasks import KINDS, generate
from ..workers.llm import LLM, RequestOutput
from ..workers.text.messages import normalise_messages, normalise_tools
from ..workers.types import SamplingParams
from .report import Figure, Row, of_requests

BENCHMARK = "accuracy"


@dataclass(frozen=True, slots=True)
class Score:
    """One kind of problem in one mode."""

    kind: str
    thinking: bool
    right: tuple[bool, ...]
    thought_tokens: tuple[int, ...]

    @property
    def share(self) -> float:
        return sum(self.right) / len(self.right)


def score_all(
    llm: LLM, count: int, seed: int, params: SamplingParams, progress: Callable[[str], None]
) -> list[Score]:
    """Ask ``count`` problems of the test split, of every kind, in both modes."""
    scores = []
    for kind in KINDS:
        problems = generate(kind, "test", seed, count)
        for thinking in (True, False):
            progress(f"{kind}, {'thinking' if thinking else 'non-thinking'}")
            outputs = _ask(llm, problems, thinking, params)
            scores.append(_score(kind, thinking, problems, outputs))
    return scores


def rows(scores: Sequence[Score], precision: str, command: str) -> list[Row]:
    """For each kind and mode the share of right answers and the thoughts' lengths.

    The spread of a share is its 95 % Wilson interval.
    """
    row = partial(
        Row.of, benchmark=BENCHMARK, system="inference-pio", precision=precision, command=command
    )
    found = []
    for score in scores:
        case = f"{score.kind}, {'thinking' if score.thinking else 'non-thinking'}"
        right = Figure(score.share, *wilson(sum(score.right), len(score.right)))
        found.append(row(right, case=case, unit="right"))
        if score.thinking:
            length = of_requests([float(tokens) for tokens in score.thought_tokens])
            found.append(row(length, case=case, unit="thought tokens"))
    return found


def wilson(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The interval that holds a share with 95 %: honest near 0 and 1, unlike the normal one."""
    share = right / count
    middle = share + z * z / (2 * count)
    spread = z * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5
    scale = 1 + z * z / count
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def _ask(
    llm: LLM, problems: Sequence[Problem], thinking: bool, params: SamplingParams
) -> list[RequestOutput]:
    template = llm.engine.loaded.text.template
    prompts = [
        template.render(
            normalise_messages(problem.messages),
            normalise_tools(problem.tools or None),
            enable_thinking=thinking,
        )
        for problem in problems
    ]
    return llm.generate(prompts, params)


def _score(
    kind: str, thinking: bool, problems: Sequence[Problem], outputs: Sequence[RequestOutput]
) -> Score:
    choices = [output.choices[0] for output in outputs]
    return Score(
        kind,
        thinking,
        tuple(is_correct(p, c.text) for p, c in zip(problems, choices, strict=True)),
        tuple(choice.usage.reasoning_tokens for choice in choices),
    )
