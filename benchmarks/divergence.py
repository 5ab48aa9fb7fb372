"""How far the next-token distributions of one model are from another's, without luck of answers.

The prompts are test problems of every kind of the embedded model, rendered by the checkpoint's own
template; of all their positions a part is taken, evenly. The reference is kept in a file of
log-probabilities, for two models need not be in memory at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..embedded.tasks import KINDS, generate
from ..kernels.context import ContextItem, build_context
from ..workers.loading import LoadedModel
from ..workers.text.messages import normalise_messages, normalise_tools

PROBLEMS = 3
"""Of each kind."""
POSITIONS = 512
"""At most: a file of 151,936 columns then takes 300 MB."""
SEED = 0
_BLOCK_SIZE = 64
_ROWS = 32
"""Positions whose logits are in memory at once."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """At each position: the KL divergence from the reference, in nats, and another top token."""

    kl: tuple[float, ...]
    changed: tuple[bool, ...]


def write_reference(loaded: LoadedModel, path: Path) -> None:
    """Write this model's log-probabilities, float32, a row a position."""
    with path.open("wb") as file:
        for log_RV in _log_probabilities(loaded):
            file.write(log_RV.numpy().tobytes())


def compare_with(loaded: LoadedModel, path: Path) -> Divergence:
    """Compare this model with the one that wrote the file.

    Raises ``ValueError`` for a file of a model with another vocabulary or template.
    """
    vocabulary = loaded.model.config.vocab_size
    size = path.stat().st_size
    if size % (4 * vocabulary):
        raise ValueError(f"the reference is not of a model with {vocabulary} rows of vocabulary")
    reference = np.memmap(
        path, dtype=np.float32, mode="r", shape=(size // 4 // vocabulary, vocabulary)
    )
    kl: list[float] = []
    changed: list[bool] = []
    for log_RV in _log_probabilities(loaded):
        # Copied: torch takes no array that cannot be written.
        wanted_RV = torch.from_numpy(np.array(reference[len(kl) : len(kl) + len(log_RV)]))
        if wanted_RV.shape != log_RV.shape:
            raise ValueError("the reference has other positions: it is of another template")
        kl += (wanted_RV.exp() * (wanted_RV - log_RV)).sum(1).clamp_min_(0).tolist()
        changed += (wanted_RV.argmax(1) != log_RV.argmax(1)).tolist()
    return Divergence(tuple(kl), tuple(changed))


def prompts(loaded: LoadedModel) -> list[list[int]]:
    """Token ids of the prompts, each within the model's limit."""
    template = loaded.text.template
    rendered = [
        template.render(
            normalise_messages(problem.messages),
            normalise_tools(problem.tools or None),
            enable_thinking=None,
        )
        for kind in KINDS
        for problem in generate(kind, "test", SEED, PROBLEMS)
    ]
    return [ids[: loaded.max_model_len] for ids in rendered]


@torch.inference_mode()
def _log_probabilities(loaded: LoadedModel) -> Iterator[Tensor]:
    """float32 [R, vocab_size] on the host, in the order of the positions."""
    model = loaded.model
    given = prompts(loaded)
    stride = -(-sum(map(len, given)) // POSITIONS)
    cache = model.new_cache(-(-max(map(len, given)) // _BLOCK_SIZE), _BLOCK_SIZE)
    blocks = range(cache.num_blocks)
    position = 0
    for ids in given:
        context = build_context([ContextItem(blocks, 0, len(ids))], _BLOCK_SIZE, model.device)
        token_ids_T = torch.tensor(ids, dtype=torch.int64, device=model.device)
        hidden_TC = model.forward(token_ids_T, context, cache)
        rows = range(-position % stride, len(ids), stride)
        position += len(ids)
        for start in range(0, len(rows), _ROWS):
            logits_RV = model.logits(hidden_TC[list(rows[start : start + _ROWS])])
            yield torch.log_softmax(logits_RV.float(), dim=1).cpu()
