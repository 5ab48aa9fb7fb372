"""What it costs to tell the ranks of a grid each step: time a step, and its share of the step.

The grid is driven without scheduler and sampler, so the share is of the forward pass alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..kernels.context import ContextItem
from ..workers.batch import BatchInputs
from ..workers.config import EngineConfig
from ..workers.parallel.control import ControlCost
from ..workers.parallel.grid import GridExecutor, start_grid
from ..workers.parallel.launcher import RankLauncher
from ..workers.parallel.local_ranks import LocalRanks
from .report import Row, of_rounds

BENCHMARK = "parallel"
BATCHES = (1, 8)
PROMPT_TOKENS = 32
DECODE_STEPS = 32


@dataclass(frozen=True, slots=True)
class GridCost:
    """Rounds of decode by batch size, on one grid."""

    grid: str
    precision: str
    rounds: dict[int, list[ControlCost]]


def measure(
    config: EngineConfig,
    rounds: int,
    progress: Callable[[str], None],
    *,
    batches: Sequence[int] = BATCHES,
    launcher: RankLauncher | None = None,
) -> GridCost:
    """Start the grid of ``config``, decode at each batch size, ``rounds`` times after a warm-up.

    Raises ``ValueError`` for a configuration of one rank, and what ``start_grid`` raises.
    """
    parallel = config.parallel
    if parallel.num_ranks == 1:
        raise ValueError("the configuration has one rank, which nobody has to tell anything")
    loaded, grid = start_grid(config, launcher or LocalRanks())
    try:
        drive = _Drive(grid, config.block_size, loaded.tokenizer.num_tokens)
        found: dict[int, list[ControlCost]] = {batch: [] for batch in batches}
        for number in range(rounds + 1):
            for batch in batches:
                progress(f"decode b{batch}, round {number} of {rounds}")
                cost = drive.decode(batch)
                if number:
                    found[batch].append(cost)
    finally:
        grid.close()
    name = f"tensor {parallel.tensor} x pipeline {parallel.pipeline}"
    return GridCost(name, str(loaded.model.dtype).removeprefix("torch."), found)


def rows(cost: GridCost, command: str) -> list[Row]:
    """A row for each batch size and figure."""
    figures: dict[str, tuple[str, Callable[[ControlCost], float]]] = {
        "step": ("ms", lambda c: 1e3 * c.step_s / c.steps),
        "control sent": ("ms", lambda c: 1e3 * c.send_s / c.steps),
        "control received": ("ms", lambda c: 1e3 * c.receive_s / c.steps),
        "control of the step": ("ratio", lambda c: c.share),
    }
    found = []
    for batch, rounds in cost.rounds.items():
        for name, (unit, value) in figures.items():
            figure = of_rounds([value(one) for one in rounds])
            found.append(
                Row.of(
                    figure,
                    benchmark=BENCHMARK,
                    system=cost.grid,
                    precision=cost.precision,
                    case=f"decode b{batch}: {name}",
                    unit=unit,
                    command=command,
                )
            )
    return found


class _Drive:
    """Random tokens through a grid, every sequence in blocks of its own."""

    def __init__(self, grid: GridExecutor, block_size: int, num_tokens: int) -> None:
        self._grid = grid
        self._blocks = -(-(PROMPT_TOKENS + DECODE_STEPS) // block_size)
        self._num_tokens = num_tokens
        self._rng = random.Random(0)

    def decode(self, batch: int) -> ControlCost:
        """Prompts, then the steps that are measured."""
        self._step(batch, 0, PROMPT_TOKENS)
        before = self._grid.control_cost()
        for position in range(PROMPT_TOKENS, PROMPT_TOKENS + DECODE_STEPS):
            self._step(batch, position, 1)
        return self._grid.control_cost().since(before)

    def _step(self, batch: int, start: int, count: int) -> None:
        ids = [self._rng.randrange(self._num_tokens // 2) for _ in range(batch * count)]
        items = [
            ContextItem(range(i * self._blocks, (i + 1) * self._blocks), start, count)
            for i in range(batch)
        ]
        rows = [(i + 1) * count - 1 for i in range(batch)]
        self._grid.forward(BatchInputs(ids, items, rows, []))
