"""Runs a service as ``inference-pio serve`` does, and does what its standard input says.

A line ``store`` is answered with the bytes in Ray's object store, ``deploy FILE`` deploys another
application file over the running one and is answered at once; the end of the input stops it all.
"""

from __future__ import annotations

import sys
from pathlib import Path

from inference_pio.deployments.application_file import Wishes, load_application
from inference_pio.deployments.launcher import LocalServer


def object_store_bytes() -> int:
    """What lies in the object store now."""
    import ray
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    return int(get_memory_info_reply(state).store_stats.object_store_bytes_used)


def deploy(file: str, port: int) -> None:
    """What ``serve deploy FILE`` does."""
    from ray.serve._private.api import serve_start
    from ray.serve.schema import ServeDeploySchema

    document = load_application(Path(file), Wishes(port=port)).document
    serve_start().deploy_apps(ServeDeploySchema.model_validate(document))


def tell(what: object) -> None:
    """Marked, for Ray writes to the same place."""
    print(f"answer: {what}", flush=True)


def main(file: str, port: int) -> None:
    """Serve until the input ends."""
    with LocalServer(load_application(Path(file), Wishes(port=port))) as server:
        server.start(lambda text: print(text, file=sys.stderr))
        tell("ready")
        for line in sys.stdin:
            word, _, argument = line.strip().partition(" ")
            if word == "store":
                tell(object_store_bytes())
            elif word == "deploy":
                deploy(argument, port)
                tell("deployed")
            else:
                raise ValueError(f"no command {word!r}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
