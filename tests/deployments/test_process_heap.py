"""What a replica has loaded costs its streams no pauses."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import gc, weakref
from inference_pio.deployments.process_heap import keep_for_good

class Node:
    pass

def cycle():
    node = Node()
    node.itself = node
    return node

kept = [cycle() for _ in range(1000)]
keep_for_good()
assert gc.get_freeze_count() > 1000
assert not any(isinstance(one, Node) for one in gc.get_objects()), "collections still look at them"
later = weakref.ref(cycle())
gc.collect()
assert later() is None, "what comes later is collected"
"""


def test_what_was_loaded_is_kept_and_what_comes_later_is_collected() -> None:
    """In a process of its own: what is frozen stays so."""
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
