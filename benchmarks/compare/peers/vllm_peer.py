"""vLLM's build for the CPU, in one process."""

from __future__ import annotations

import os
import random
import time


def prepare(checkpoint: str, precision: str, folder: str) -> None:
    """The checkpoint is read as it is."""


class Peer:
    """An engine that takes ids."""

    def __init__(self, checkpoint: str, precision: str, folder: str, threads: int) -> None:
        os.environ.update(
            VLLM_CPU_KVCACHE_SPACE="1",
            VLLM_CPU_OMP_THREADS_BIND=f"0-{threads - 1}",
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
            HF_HUB_OFFLINE="1",
        )
        import vllm

        self.version = str(vllm.__version__)
        self._vllm = vllm
        self._engine = vllm.LLM(
            model=checkpoint,
            dtype=precision,
            max_model_len=4096,
            max_num_batched_tokens=4096,
            max_num_seqs=64,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            enforce_eager=True,
        )
        self._random = random.Random(0)

    def decode_seconds(self, batch: int, prompt: int, steps: int) -> float:
        """Of ``steps`` tokens for each of ``batch`` sequences, behind the first."""
        return self._generate(batch, prompt, steps + 1) - self._generate(batch, prompt, 1)

    def first_token_seconds(self, length: int) -> float:
        """From a prompt of ``length`` tokens to its first token."""
        return self._generate(1, length, 1)

    def _generate(self, batch: int, prompt: int, new_tokens: int) -> float:
        prompts = [
            {"prompt_token_ids": [self._random.randrange(300, 1000) for _ in range(prompt)]}
            for _ in range(batch)
        ]
        params = self._vllm.SamplingParams(
            temperature=0,
            max_tokens=new_tokens,
            min_tokens=new_tokens,
            ignore_eos=True,
            detokenize=False,
        )
        begin = time.perf_counter()
        results = self._engine.generate(prompts, params, use_tqdm=False)
        took = time.perf_counter() - begin
        if [len(result.outputs[0].token_ids) for result in results] != [new_tokens] * batch:
            raise RuntimeError("vLLM gave another number of tokens")
        return took
