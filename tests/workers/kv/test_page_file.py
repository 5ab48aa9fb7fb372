"""The file of the disk tier: private, nameless, and gone with its process."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np

from inference_pio.workers.kv.page_file import PageFile, PageRead, PageWrite, page_checksum
from inference_pio.workers.kv.tier import Page
from inference_pio.workers.types import BlockHash

SIZE = 4096

HOLDER = """
import sys
from pathlib import Path
import numpy as np
from inference_pio.workers.kv.page_file import PageFile, PageWrite
from inference_pio.workers.kv.tier import Page
file = PageFile(Path(sys.argv[1]), 2**20)
file.submit(PageWrite(Page("disk", b"n" * 32, b"", 0), np.ones(4096, np.uint8)))
file.wait(30)
assert file.collect()[0].error is None
print("written", flush=True)
sys.stdin.read()
"""


def page(name: bytes, slot: int, content: np.ndarray) -> Page:
    named = BlockHash(name * 32)
    return Page("disk", named, b"", slot, page_checksum(named, content))


def test_pages_come_back_as_they_went(tmp_path: Path) -> None:
    file = PageFile(tmp_path, 2**20)
    contents = [np.full(SIZE, number, np.uint8) for number in range(3)]
    pages = [page(b"abc"[n : n + 1], 2 - n, content) for n, content in enumerate(contents)]
    for one, content in zip(pages, contents, strict=True):
        file.submit(PageWrite(one, content))
    read = PageRead(tuple(pages), np.empty(3 * SIZE, np.uint8))
    done = []
    while len(done) < 3:
        file.wait(30)
        done += file.collect()
    file.submit(read)
    file.wait(30)
    assert file.collect() == [read]
    assert (read.num_good, read.error) == (3, None)
    assert np.array_equal(read.into, np.concatenate(contents))
    file.close()
    assert not file.is_alive


def test_the_content_of_another_page_does_not_pass() -> None:
    content = np.ones(SIZE, np.uint8)
    assert page(b"a", 0, content).checksum != page(b"b", 0, content).checksum


def test_nobody_else_can_open_it_or_inherits_it(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    file = PageFile(folder, 2**20)
    assert list(folder.iterdir()) == []
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    found = os.fstat(file._file)
    assert (stat.S_IMODE(found.st_mode), found.st_nlink) == (0o600, 0)
    assert not os.get_inheritable(file._file)
    file.close()


def test_a_killed_process_leaves_nothing(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"written\n"
        assert list(tmp_path.iterdir()) == []
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []
