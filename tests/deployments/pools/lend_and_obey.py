"""A process that lends tickets by NIXL as its standard input says.

``lend N`` lends N bytes (``pattern(N)``) and is answered with what a reader needs, ``back`` takes
all back, ``used`` is answered with the bytes that are lent; the end of the input ends it.
"""

from __future__ import annotations

import asyncio
import pickle
import sys
import uuid

import numpy as np

from inference_pio.deployments.nixl_link import NixlLink
from inference_pio.workers.kv.ticket import Buffer


def pattern(size: int) -> Buffer:
    """Bytes that differ from one position, and one size, to the next."""
    return np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)


def tell(what: str) -> None:
    """Marked, for NIXL writes to the same place."""
    print(f"answer: {what}", flush=True)


async def main(lend_bytes: int) -> None:
    link, keys = NixlLink(lend_bytes), []
    for line in sys.stdin:
        word, _, number = line.strip().partition(" ")
        if word == "lend":
            keys.append(uuid.uuid4().hex)
            metadata = await link.lend(keys[-1], pattern(int(number)))
            tell(pickle.dumps(metadata).hex())
        elif word == "back":
            while keys:
                link.take_back(keys.pop())
        else:
            tell(str(link.lent_bytes))
    link.close()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
