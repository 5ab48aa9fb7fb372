"""Run by ``test_memory_limit``: an engine in a process of its own, which may be killed.

Arguments: checkpoint folder, ``weight_memory_bytes`` or 0, number of tokens. Prints JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from inference_pio import LLM, SamplingParams


def status_bytes(key: str) -> int:
    """A size of this process, as the system counts it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise KeyError(key)


def main(folder: str, limit: int, num_tokens: int) -> None:
    """Complete two prompts greedily."""
    params = SamplingParams(
        temperature=0.0, max_tokens=num_tokens, ignore_eos=True, loop_guard=False
    )
    prompts = [[1, 2, 3, 4, 5], [9, 8, 7]]
    with LLM(
        folder,
        weight_memory_bytes=limit or None,
        kv_cache_bytes=32 << 20,
        max_num_seqs=2,
        num_threads=1,
    ) as llm:
        tokens = [result.choices[0].token_ids for result in llm.generate(prompts, params)]
        found = {
            "tokens": tokens,
            "streamed": llm.engine.stats().weight_bytes_streamed,
            "peak": status_bytes("VmHWM"),
            "own": status_bytes("RssAnon"),
            "data": status_bytes("VmData"),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
