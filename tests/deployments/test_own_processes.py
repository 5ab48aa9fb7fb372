from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

# Starts a child that starts a grandchild, prints both ids; the child dies at once, so that the
# grandchild is an orphan; then ends everything below itself and prints how many there were.
SCRIPT = """
import subprocess, sys, time
from inference_pio.deployments.own_processes import adopt_orphans, descendants, end_descendants

adopt_orphans()
sleeper = "import signal, time; {ignore}; print('up', flush=True); time.sleep(600)"
middle = (
    "import subprocess, sys;"
    f"p = subprocess.Popen([sys.executable, '-c', {{sleeper!r}}], stdout=subprocess.PIPE);"
    "p.stdout.readline(); print(p.pid, flush=True)"
)
child = subprocess.Popen([sys.executable, "-c", middle], stdout=subprocess.PIPE, text=True)
orphan = int(child.stdout.readline())
child.wait()
assert [process.pid for process in descendants()] == [orphan], descendants()
print(orphan, end_descendants(grace_s=0.5), len(descendants()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux hands orphans to a subreaper")
@pytest.mark.parametrize("ignore", ["pass", "signal.signal(signal.SIGTERM, signal.SIG_IGN)"])
def test_orphans_are_found_and_ended_even_if_they_ignore_sigterm(ignore: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(ignore=ignore)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    orphan, ended, left = map(int, done.stdout.split())
    assert (ended, left) == (1, 0)
    assert not psutil.pid_exists(orphan)
