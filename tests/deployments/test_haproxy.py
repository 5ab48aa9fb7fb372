from __future__ import annotations

import subprocess
from pathlib import Path

from inference_pio.deployments.haproxy import write_wrapper


def test_the_wrapper_is_the_same_haproxy(tmp_path: Path) -> None:
    folder = tmp_path / "with space"
    folder.mkdir()
    wrapper = write_wrapper(folder)
    answer = subprocess.run([wrapper, "-v"], capture_output=True, text=True, check=True)
    assert answer.stdout.startswith("HAProxy version")
