"""Trains the embedded model on one CPU core: `python -m inference_pio.embedded.train`.

Matrices are trained with Muon and everything else with AdamW, which on this task needs a small
part of the steps that AdamW alone needs. Forward and backward run in bf16, weights stay in fp32
until they are saved.
"""

import argparse
import time
from pathlib import Path

import torch
from torch.nn import Parameter
from torch.nn import functional as F
from torch.optim import Optimizer
from transformers import Qwen3Config, Qwen3ForCausalLM

from . import checkpoint_path
from .batches import IGNORED, Batch, training_batches
from .checkpoint import model_config, save_checkpoint
from .tokenizer import build_tokenizer

SEED = 20251
"""Seed of the committed checkpoint, for weights and for problems."""

STEPS = 8_600
TOKENS = 2048
"""Tokens a step, padding included."""

LEARNING_RATE = 6e-3
WARM_UP_STEPS = 300
"""Steps in which the rate rises."""

DECAY_STEPS = 3_700
"""Last steps, in which the rate falls to zero; accuracy rises most there."""

GRADIENT_NORM = 1.0
REPORT_SECONDS = 30.0
SAVE_SECONDS = 300.0


def rate_factor(step: int, steps: int) -> float:
    """Learning rate of a step as a share of the highest: up, level, then down to zero."""
    return min(1.0, (step + 1) / WARM_UP_STEPS, (steps - step) / DECAY_STEPS)


def make_optimizers(model: Qwen3ForCausalLM) -> list[Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms."""
    matrices: list[Parameter] = []
    others: list[Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and "embed" not in name
        (matrices if is_matrix else others).append(parameter)
    muon = torch.optim.Muon(
        matrices,
        lr=LEARNING_RATE,
        weight_decay=0.01,
        momentum=0.95,
        adjust_lr_fn="match_rms_adamw",
    )
    adamw = torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
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


def train(steps: int, seed: int, out: Path) -> None:
    """Trains from nothing and writes the checkpoint, several times on the way."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    config = Qwen3Config(**model_config(tokenizer))
    # On a CPU the backward pass of fused attention costs far more than that of plain products.
    config._attn_implementation = "eager"
    model = Qwen3ForCausalLM(config).float()  # type: ignore[no-untyped-call]
    optimizers = make_optimizers(model)
    batches = training_batches(tokenizer, seed, TOKENS)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{size:,} parameters, {2 * size / 1e6:.2f} MB in bf16")

    begun = reported = saved = time.monotonic()
    losses: list[torch.Tensor] = []
    for step in range(steps):
        factor = rate_factor(step, steps)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * factor
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
                f"{(now - begun) / 60:5.1f} min  step {step + 1:6d}/{steps}"
                f"  rate {factor:.3f}  loss {mean:.4f}",
                flush=True,
            )
            reported = now
            losses.clear()
        if now - saved > SAVE_SECONDS:
            save_checkpoint(out, tokenizer, model.state_dict())
            saved = now
    save_checkpoint(out, tokenizer, model.state_dict())
    print(f"wrote {out} after {(time.monotonic() - begun) / 60:.1f} min")


def main() -> None:
    """Reads the command line and trains."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=checkpoint_path())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(arguments.steps, arguments.seed, arguments.out)


if __name__ == "__main__":
    main()
