"""An engine that is built in stages, with the memory that the process has after each.

1. ``start``: everything is imported, and a tiny model was loaded in the same way, run and dropped:
   code and libraries that come with first use are not taken for weights.
2. ``text``: tokenizer and template are read.
3. ``loaded``: the model is packed; ``weights``: and what loading left free in the C library is
   given back, which the next stages would take first.
4. ``kv``: the KV pool is allocated and touched.
5. ``full``: prompts fill the pool to its last block, in the largest steps there are.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from ..workers.config import EngineConfig
from ..workers.engine import Engine
from ..workers.executor import LocalExecutor
from ..workers.loading import load_part, load_text_for, pool_blocks, with_pool
from ..workers.types import GenerateRequest, SamplingParams
from .resident import Resident, give_back_free, resident
from .systems import random_prompt

_SMALL_KV_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Stages:
    """What the process had after each stage of building the engine."""

    start: Resident
    text: Resident
    loaded: Resident
    weights: Resident
    kv: Resident


@dataclass(frozen=True, slots=True)
class Filled:
    """The pool at its fullest."""

    full: Resident
    tokens: int
    """Held in the pool at once."""
    capacity: int
    """Tokens that its blocks have room for."""


def build_in_stages(config: EngineConfig) -> tuple[Engine, Stages]:
    """The engine of a configuration, on one device. Raises what ``Engine`` raises."""
    _touch_code(config)
    give_back_free()
    start = resident()
    text = load_text_for(config)
    after_text = resident()
    part = load_part(config)
    cuda = part.model.device.type == "cuda"
    after_loading = resident(cuda=cuda)
    give_back_free()
    after_weights = resident(cuda=cuda)
    loaded = with_pool(config, text, part, pool_blocks(config, part))
    executor = LocalExecutor(
        loaded.model, num_blocks=loaded.num_blocks, block_size=config.block_size
    )
    after_kv = resident(cuda=cuda)
    engine = Engine(config, built=(loaded, executor))
    return engine, Stages(start, after_text, after_loading, after_weights, after_kv)


def _touch_code(config: EngineConfig) -> None:
    """Load the embedded model as ``config`` says, and run it through a prompt and a step."""
    small = {"model": "embedded", "max_model_len": None, "kv_cache_bytes": _SMALL_KV_BYTES}
    engine = Engine(config.model_copy(update=small))
    params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    engine.add(GenerateRequest("touch", tuple(range(config.block_size)), params))
    while engine.has_work:
        engine.step()


def fill(engine: Engine, seed: int = 0) -> Filled:
    """Fill the pool with prompts of random tokens, measure, and empty it again.

    Raises ``ValueError`` for a pool so large that the first sequences end before the last begin.
    """
    size, most = engine.config.block_size, engine.config.max_num_seqs
    total = engine.stats().kv_blocks_total
    blocks = [total // most + (number < total % most) for number in range(most)]
    lengths = [max(1, (count - 1) * size) for count in blocks if count]
    rng = random.Random(seed)
    # The last block of each is for what it generates while the others' prompts are computed.
    params = SamplingParams(temperature=0.0, max_tokens=size, ignore_eos=True, loop_guard=False)
    held = dict.fromkeys(range(len(lengths)), 0)
    for number, length in enumerate(lengths):
        ids = random_prompt(length, engine.loaded.tokenizer.num_tokens, rng)
        request = GenerateRequest(f"fill-{number}", tuple(ids), params)
        engine.validate(request)
        engine.add(request)
    while engine.has_work and engine.stats().kv_blocks_used < total:
        for chunk in engine.step().chunks:
            number = int(chunk.request_id.removeprefix("fill-"))
            held[number] = (held[number] or lengths[number]) + len(chunk.token_ids)
    if not engine.has_work:
        raise ValueError(
            f"{len(lengths)} sequences did not fill {total} blocks of KV at once; "
            "measure with a smaller pool"
        )
    full = resident(cuda=engine.loaded.model.device.type == "cuda")
    engine.abort_all()
    while engine.has_work:
        engine.step()
    return Filled(full, sum(held.values()), total * size)
