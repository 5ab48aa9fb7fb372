"""A rank that is not rank 0: joins its group, then does what it is told until it is closed.

1. ``run_rank`` connects to rank 0, so that each knows that the other lives;
2. it loads its part of the model and joins the groups (``joining``);
3. ``RankLoop`` takes command after command and computes its share of each;
4. it ends when it is told to, when rank 0 is gone, or when something fails here: then rank 0 hears
   why, and ends everybody.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence

import torch

from ..executor import GroupLostError
from ..types import BlockId
from .command import Kind, decode_step
from .control import microseconds_since, receive_command
from .joining import join
from .launcher import RankSpec
from .signs_of_life import LifeLink
from .stage import Stage
from .store import connect_store

logger = logging.getLogger(__name__)

LOST_EXIT_CODE = 3


def exit_process(reason: str) -> None:
    """End this process at once: a thread of it may hang in a collective for ever."""
    logger.error("this rank ends: %s", reason)
    os._exit(LOST_EXIT_CODE)


def run_rank(spec: RankSpec, on_group_lost: Callable[[str], None] = exit_process) -> None:
    """Be a rank until the group ends; the entry point of every launcher, in any process.

    Returns when rank 0 closes the group. ``on_group_lost`` is called when it is gone instead, from
    any thread; if that returns, so does this function, once nothing hangs any more. Raises what
    loading raises, which rank 0 is told.
    """
    rank = spec.shard.rank
    timeout_s = spec.config.parallel.rank_timeout_s
    link = LifeLink(spec.host, spec.life_port, rank, spec.token, timeout_s, on_group_lost)
    try:
        store = connect_store(spec.host, spec.store_port)
        joined = join(spec.config, spec.shard, store, link.address, link)
        link.watch_silence()
        try:
            RankLoop(joined.stage).run()
        finally:
            joined.groups.close()
            joined.stage.model.close()
    except GroupLostError as error:
        link.fail(f"lost its group: {error}")
        on_group_lost(str(error))
    except BaseException as error:
        link.fail(f"failed: {type(error).__name__}: {error}")
        raise
    else:
        link.close()


class RankLoop:
    """Runs the commands of rank 0 on this rank's stage."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._waited_us = 0

    @torch.inference_mode()
    def run(self) -> None:
        """Until told to close. Raises ``GroupLostError``."""
        while True:
            kind, sent_ns, payload = receive_command(self._stage.groups.grid)
            if kind is Kind.CLOSE:
                return
            self._do(kind, sent_ns, payload)

    def _do(self, kind: Kind, sent_ns: int, payload: Sequence[int]) -> None:
        stage = self._stage
        blocks = [BlockId(word) for word in payload]
        if kind is Kind.STEP:
            step = decode_step(payload)
            self._waited_us += microseconds_since(sent_ns)
            stage.forward(step)
            if step.sample_rows:
                stage.logits(step.sample_rows)
        elif kind is Kind.LOGITS:
            stage.logits(payload)
        elif kind is Kind.COPY_BLOCKS:
            stage.copy_blocks(list(zip(blocks[::2], blocks[1::2], strict=True)))
        elif kind is Kind.READ_BLOCKS:
            stage.read_blocks(blocks, None)
        elif kind is Kind.WRITE_BLOCKS:
            stage.write_blocks(blocks, None)
        elif kind is Kind.CONTROL_COST:
            stage.groups.grid.gather(torch.tensor([self._waited_us]))
        else:
            raise ValueError(f"rank 0 sent command {kind}, which this rank does not know")
