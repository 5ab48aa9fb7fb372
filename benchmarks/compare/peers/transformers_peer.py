"""transformers: ``generate`` with its default attention and a dynamic cache."""

from __future__ import annotations

import random
import time
from typing import Any

import torch
import transformers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def prepare(checkpoint: str, precision: str, folder: str) -> None:
    """The checkpoint is read as it is."""


class Peer:
    """A loaded model."""

    generation_options: dict[str, Any] = {}  # noqa: RUF012
    """What ``generate`` is told beyond lengths."""

    def __init__(self, checkpoint: str, precision: str, folder: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        loader: Any = transformers.AutoModelForCausalLM
        self.version = transformers.__version__
        self._model = loader.from_pretrained(checkpoint, dtype=DTYPES[precision])
        self._model.to(self._device).eval()
        self._vocabulary = int(self._model.config.vocab_size)
        self._random = random.Random(0)

    def decode_seconds(self, batch: int, prompt: int, steps: int) -> float:
        """Of ``steps`` tokens for each of ``batch`` sequences, behind the first."""
        times = self._generate(batch, prompt, steps + 1)
        return times[-1] - times[1]

    def first_token_seconds(self, length: int) -> float:
        """From a prompt of ``length`` tokens to its first token."""
        times = self._generate(1, length, 1)
        return times[1] - times[0]

    def _generate(self, batch: int, prompt: int, new_tokens: int) -> list[float]:
        """Times of the start and of each token."""
        ids = torch.tensor(
            [
                [self._random.randrange(self._vocabulary // 2) for _ in range(prompt)]
                for _ in range(batch)
            ],
            device=self._device,
        )
        config = transformers.GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            **self.generation_options,
        )
        times = [time.perf_counter()]

        def note_time(ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
            if ids.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter())
            return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)

        with torch.inference_mode():
            self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                stopping_criteria=[note_time],
            )
        return times
