"""Which part of a model one rank of a grid holds: layers, heads, MLP channels, vocabulary rows.

The grid is ``[pipeline][tensor]``, counted row by row: rank 0 is the first tensor rank of the first
stage. A model in one process is the grid of one.

Where there are fewer KV heads than tensor ranks, ranks share a KV head and each has a copy of it:
      8 query heads, 2 KV heads, 4 ranks
      q 0 1 | 2 3 | 4 5 | 6 7
      kv  0 |   0 |   1 |   1
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from .config import CheckpointError, ModelConfig


@dataclass(frozen=True, slots=True)
class ShardSpec:
    """A place in the grid."""

    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1

    def __post_init__(self) -> None:
        if not (0 <= self.tp_rank < self.tp_size and 0 <= self.pp_rank < self.pp_size):
            raise ValueError(
                f"tensor rank {self.tp_rank} of {self.tp_size} and stage {self.pp_rank} of "
                f"{self.pp_size} are no place in a grid"
            )

    @classmethod
    def of_rank(cls, rank: int, *, tp_size: int, pp_size: int) -> Self:
        """The place of a rank."""
        return cls(rank % tp_size, tp_size, rank // tp_size, pp_size)

    @property
    def rank(self) -> int:
        """Its number in the grid."""
        return self.pp_rank * self.tp_size + self.tp_rank

    @property
    def num_ranks(self) -> int:
        return self.tp_size * self.pp_size

    @property
    def is_first_stage(self) -> bool:
        """Whether it has the embedding."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether it has the final norm and the head."""
        return self.pp_rank == self.pp_size - 1

    @property
    def whole_layers(self) -> ShardSpec:
        """The same stage with all of its layers' weights."""
        return ShardSpec(0, 1, self.pp_rank, self.pp_size)

    def layers(self, config: ModelConfig) -> range:
        """Decoder layers; the first stages have one more where they do not divide."""
        return even_span(config.num_layers, self.pp_size, self.pp_rank)

    def query_heads(self, config: ModelConfig) -> range:
        """Query heads; all of them belong to the rank's KV heads."""
        return even_span(config.num_heads, self.tp_size, self.tp_rank)

    def kv_heads(self, config: ModelConfig) -> range:
        """Key and value heads; one that is shared where there are more ranks than heads."""
        first = self.tp_rank * config.num_kv_heads // self.tp_size
        return range(first, first + max(1, config.num_kv_heads // self.tp_size))

    def mlp_channels(self, config: ModelConfig) -> range:
        """Columns of the gate and up projections, and rows of the down projection."""
        return even_span(config.intermediate_size, self.tp_size, self.tp_rank)

    def vocabulary(self, config: ModelConfig) -> range:
        """Rows of the embedding and the head; the first ranks have one more."""
        return even_span(config.vocab_size, self.tp_size, self.tp_rank)

    def local_config(self, config: ModelConfig) -> ModelConfig:
        """``config`` with this part's numbers of layers and heads."""
        return replace(
            config,
            num_layers=len(self.layers(config)),
            num_heads=len(self.query_heads(config)),
            num_kv_heads=len(self.kv_heads(config)),
        )


WHOLE = ShardSpec()
"""The only part of a model that is not split."""


def even_span(total: int, parts: int, index: int) -> range:
    """Part ``index`` of ``total`` things in ``parts`` runs whose lengths differ by one at most."""
    size, longer = divmod(total, parts)
    start = index * size + min(index, longer)
    return range(start, start + size + (index < longer))


def check_grid(config: ModelConfig, *, tp_size: int, pp_size: int) -> None:
    """Raise ``CheckpointError`` where a model cannot be split so, with the numbers."""
    if pp_size > config.num_layers:
        raise CheckpointError(
            f"{pp_size} pipeline stages for {config.num_layers} layers; a stage has at least one"
        )
    heads, kv_heads = config.num_heads, config.num_kv_heads
    if heads % tp_size or (kv_heads % tp_size and tp_size % kv_heads):
        fitting = [n for n in range(1, heads + 1) if not heads % n]
        fitting = [n for n in fitting if not (kv_heads % n and n % kv_heads)]
        raise CheckpointError(
            f"{heads} query heads and {kv_heads} key/value heads cannot be split over {tp_size} "
            f"tensor ranks; {', '.join(map(str, fitting))} are possible"
        )
    for name, size in (
        ("intermediate_size", config.intermediate_size),
        ("vocab_size", config.vocab_size),
    ):
        if size < tp_size:
            raise CheckpointError(f"{name} is {size}; it cannot be split over {tp_size} ranks")
