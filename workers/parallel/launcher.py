"""What a rank is told, and who starts ranks: subprocesses here, actors in a cluster."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Protocol, Self

from ..config import EngineConfig
from ..model.shard import ShardSpec


@dataclass(frozen=True, slots=True)
class RankSpec:
    """Everything that a rank needs to join: plain values, so it can cross to another process.

    Rank 0 listens on ``host``: at ``store_port`` ranks find each other, at ``life_port`` they tell
    that they live. ``token`` shows that a rank is one of this group; keep it out of command lines.
    """

    config: EngineConfig
    shard: ShardSpec
    host: str
    store_port: int
    life_port: int
    token: bytes = field(repr=False)

    def to_json(self) -> str:
        """For ``from_json``."""
        return json.dumps(
            {
                "config": self.config.model_dump(mode="json"),
                "shard": asdict(self.shard),
                "host": self.host,
                "store_port": self.store_port,
                "life_port": self.life_port,
                "token": base64.b64encode(self.token).decode(),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Raises ``ValueError`` for a text that is none."""
        raw = json.loads(text)
        return cls(
            config=EngineConfig.model_validate(raw["config"]),
            shard=ShardSpec(**raw["shard"]),
            host=raw["host"],
            store_port=raw["store_port"],
            life_port=raw["life_port"],
            token=base64.b64decode(raw["token"]),
        )


class RankHandle(Protocol):
    """A started rank."""

    def is_alive(self) -> bool:
        """Whether its process is there; any thread may ask."""
        ...

    def kill(self) -> None:
        """End its process at once, also one that is stopped; a dead one is left as it is."""
        ...


class RankLauncher(Protocol):
    """Starts the ranks of one engine, all but rank 0, by running ``run_rank`` for each."""

    @property
    def host(self) -> str:
        """An address of this process that its ranks reach; nothing listens on any other."""
        ...

    def start(self, specs: Sequence[RankSpec]) -> Sequence[RankHandle]:
        """One handle a spec, in order; returns before the ranks have joined."""
        ...
