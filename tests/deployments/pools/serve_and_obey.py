"""Runs a service as ``inference-pio serve`` does, and does what its standard input says.

A line ``store`` is answered with the bytes in Ray's object store, ``fill`` fills it up and
``drain`` lets go of that again, ``deploy FILE`` deploys another application file over the running
one and is answered at once; the end of the input stops it all. A third argument is the store's size
in bytes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from inference_pio.deployments import launcher
from inference_pio.deployments.application_file import Wishes, load_application

SMALLEST_BYTES = 128 * 2**10  # Ray keeps objects of up to 100 KiB elsewhere


def object_store_bytes() -> int:
    """What lies in the object store now, give or take the last second.

    As Ray's scheduler sees it: the store's own figures come with those of every process, and one
    that is stopped would hold them up.
    """
    import ray

    name = "object_store_memory"
    return int(ray.cluster_resources()[name] - ray.available_resources().get(name, 0))


def fill() -> list[Any]:
    """Objects that leave no room for another one of ``SMALLEST_BYTES``."""
    import numpy as np
    import ray
    from ray.exceptions import ObjectStoreFullError, OutOfDiskError

    ballast: list[Any] = []
    size = 8 * 2**20
    while size >= SMALLEST_BYTES:
        try:
            ballast.append(ray.put(np.zeros(size, dtype=np.uint8)))
        except (ObjectStoreFullError, OutOfDiskError):
            size //= 2
    return ballast


def deploy(file: str, port: int) -> None:
    """What ``serve deploy FILE`` does."""
    from ray.serve._private.api import serve_start
    from ray.serve.schema import ServeDeploySchema

    document = load_application(Path(file), Wishes(port=port)).document
    serve_start().deploy_apps(ServeDeploySchema.model_validate(document))


def tell(what: object) -> None:
    """Marked, for Ray writes to the same place."""
    print(f"answer: {what}", flush=True)


def main(file: str, port: int, store_bytes: int | None = None) -> None:
    """Serve until the input ends."""
    ballast: list[Any] = []
    if store_bytes is not None:
        launcher.object_store_bytes = lambda *_: store_bytes
    with launcher.LocalServer(load_application(Path(file), Wishes(port=port))) as server:
        server.start(lambda text: print(text, file=sys.stderr))
        tell("ready")
        for line in sys.stdin:
            word, _, argument = line.strip().partition(" ")
            if word == "store":
                tell(object_store_bytes())
            elif word == "fill":
                ballast = fill()
                tell("full")
            elif word == "drain":
                ballast.clear()
                tell("drained")
            elif word == "deploy":
                deploy(argument, port)
                tell("deployed")
            else:
                raise ValueError(f"no command {word!r}")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
