"""Trains the embedded model on one CPU core: `python -m inference_pio.embedded.train`.

Matrices are trained with Muon and everything else with AdamW, which on this task needs a small
part of the steps that AdamW alone needs. Forward and backward run in bf16, weights stay in fp32
until they are saved.
"""

import argparse
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.nn import Parameter
from torch.nn import functional as F
from torch.optim import Optimizer
from transformers import Qwen3Config, Qwen3ForCausalLM

from . import checkpoint_path
from .batches import (
    FINISHING_MIXTURE,
    IGNORED,
    MAIN_MIXTURE,
    POLISHING_MIXTURE,
    Batch,
    Mixture,
    training_batches,
)
from .checkpoint import model_config, save_checkpoint
from .tokenizer import build_tokenizer

SEED = 20251
"""Seed of the committed checkpoint, for weights and for problems."""

TOKENS = 2048
"""Tokens a step, padding included."""


@dataclass(frozen=True)
class Stage:
    """One run of the optimizers, from the checkpoint of the stage before."""

    steps: int

    rate: float
    """Highest learning rate."""

    warm_up_steps: int
    """First steps, in which the rate rises."""

    decay_steps: int
    """Last steps, in which the rate falls to zero; accuracy rises most there."""

    mixtures: Mapping[int, Mixture]
    """Mixture of tasks by the number of the batch from which it holds."""


STAGES = (
    Stage(
        steps=8_600,
        rate=6e-3,
        warm_up_steps=300,
        decay_steps=3_700,
        mixtures={0: MAIN_MIXTURE, 6_900: FINISHING_MIXTURE},
    ),
    Stage(
        steps=1_900,
        rate=3e-3,
        warm_up_steps=60,
        decay_steps=1_800,
        mixtures={0: POLISHING_MIXTURE},
    ),
)

GRADIENT_NORM = 1.0
REPORT_SECONDS = 30.0
SAVE_SECONDS = 300.0

_ATTENTION = "eager"
"""On a CPU the backward pass of fused attention costs far more than that of plain products."""


def rate_of(stage: Stage, step: int) -> float:
    """Learning rate of a step: up, level, then down to zero."""
    rising = (step + 1) / stage.warm_up_steps
    falling = (stage.steps - step) / stage.decay_steps
    return stage.rate * min(1.0, rising, falling)


def make_optimizers(model: Qwen3ForCausalLM, rate: float) -> list[Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms."""
    matrices: list[Parameter] = []
    others: list[Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and "embed" not in name
        (matrices if is_matrix else others).append(parameter)
    muon = torch.optim.Muon(
        matrices,
        lr=rate,
        weight_decay=0.01,
        momentum=0.95,
        adjust_lr_fn="match_rms_adamw",
    )
    adamw = torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    return [muon, adamw]


def completion_loss(model: Qwen3ForCausalLM, batch: Batch) -> torch.Tensor:
    """Mean cross entropy over the tokens of the completions, weighted by row."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(input_ids=batch.ids, use_cache=False).last_hidden_state
        wanted = batch.labels[:, 1:]
        kept = wanted != IGNORED
        # Prompts are a third of all positions: their logits are never needed.
        logits = model.lm_head(hidden[:, :-1][kept])
    weights = batch.weights.expand_as(wanted)[kept]
    losses = F.cross_entropy(logits.float(), wanted[kept], reduction="none")
    return (losses * weights).sum() / weights.sum()


def new_model(tokenizer: Tokenizer) -> Qwen3ForCausalLM:
    """A model with random weights in fp32."""
    config = Qwen3Config(**model_config(tokenizer))
    config._attn_implementation = _ATTENTION
    return Qwen3ForCausalLM(config).float()  # type: ignore[no-untyped-call, no-any-return]


def train_stage(model: Qwen3ForCausalLM, stage: Stage, seed: int, out: Path) -> None:
    """Trains in place and writes the checkpoint, several times on the way."""
    tokenizer = build_tokenizer()
    optimizers = make_optimizers(model, stage.rate)
    batches = training_batches(tokenizer, stage.mixtures, seed, TOKENS)
    begun = reported = saved = time.monotonic()
    losses: list[torch.Tensor] = []
    for step in range(stage.steps):
        rate = rate_of(stage, step)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        loss = completion_loss(model, next(batches))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())

        now = time.monotonic()
        if now - reported > REPORT_SECONDS:
            mean = torch.stack(losses).mean().item()
            print(
                f"{(now - begun) / 60:5.1f} min  step {step + 1:6d}/{stage.steps}"
                f"  rate {rate:.5f}  loss {mean:.4f}",
                flush=True,
            )
            reported = now
            losses.clear()
        if now - saved > SAVE_SECONDS:
            save_checkpoint(out, tokenizer, model.state_dict())
            saved = now
    save_checkpoint(out, tokenizer, model.state_dict())
    print(f"wrote {out} after {(time.monotonic() - begun) / 60:.1f} min", flush=True)


def train(seed: int, out: Path, first_stage: int = 0) -> None:
    """Runs the stages; from the second on, each starts from the checkpoint in `out`."""
    for number, stage in enumerate(STAGES[first_stage:], first_stage):
        torch.manual_seed(seed + number)
        if number == 0:
            model = new_model(build_tokenizer())
        else:
            model = Qwen3ForCausalLM.from_pretrained(
                out, dtype=torch.float32, attn_implementation=_ATTENTION
            )
        size = sum(parameter.numel() for parameter in model.parameters())
        print(f"stage {number}: {size:,} parameters, {2 * size / 1e6:.2f} MB in bf16")
        train_stage(model, stage, seed + number, out)


def main() -> None:
    """Reads the command line and trains."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--stage", type=int, default=0, help="first stage to run, from 0")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=checkpoint_path())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(arguments.seed, arguments.out, arguments.stage)


if __name__ == "__main__":
    main()
