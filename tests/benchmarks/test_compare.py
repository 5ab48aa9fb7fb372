"""The comparison on the embedded model: real processes in turns, and what one that fails costs."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from inference_pio.benchmarks.compare import comparison, install
from inference_pio.benchmarks.compare.catalog import PeerSpec, catalog
from inference_pio.benchmarks.compare.install import PeerUnavailableError
from inference_pio.benchmarks.compare.process import PeerProcess
from inference_pio.benchmarks.speed import Case

CASES = [Case("decode", 2), Case("prefill", 32)]

BROKEN = """
def prepare(checkpoint, precision, folder):
    pass

class Peer:
    version = "9"

    def __init__(self, checkpoint, precision, folder, threads):
        pass

    def decode_seconds(self, batch, prompt, steps):
        raise RuntimeError("no such kernel")

    def first_token_seconds(self, length):
        return 1.0
"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def own(embedded_dir: Path, tmp_path: Path) -> Iterator[PeerProcess]:
    spec = catalog()["inference-pio"]
    process = PeerProcess(spec, embedded_dir, "bfloat16", 1, tmp_path / "own")
    process.start(lambda _: None)
    yield process
    process.close()


def broken_spec(tmp_path: Path) -> PeerSpec:
    """A system that comes up and fails when it is asked."""
    script = tmp_path / "broken_peer.py"
    script.write_text(BROKEN, encoding="utf-8")
    return PeerSpec("broken", str(script), ("bfloat16",))


@pytest.mark.parametrize(
    "peer",
    [
        pytest.param(replace(catalog()["inference-pio"], name="the same"), id="the same again"),
        pytest.param(catalog()["transformers"], id="transformers", marks=pytest.mark.slow),
    ],
)
def test_systems_are_measured_and_the_broken_one_is_a_note(
    peer: PeerSpec, embedded_dir: Path, tmp_path: Path
) -> None:
    specs = [catalog()["inference-pio"], broken_spec(tmp_path), peer]
    outcome = comparison.compare(
        embedded_dir,
        specs,
        ["bfloat16"],
        CASES,
        threads=1,
        rounds=1,
        command="c",
        progress=lambda _: None,
    )
    rates = {(r.case, r.system): r.median for r in outcome.rows if r.unit == "tok/s"}
    assert rates.keys() == {
        (case, system)
        for case in ("decode b2", "prefill 32")
        for system in ("inference-pio", peer.name)
    }
    ratio = next(r for r in outcome.rows if r.unit == "ratio" and r.case == "prefill 32")
    assert ratio.system == f"inference-pio / {peer.name}"
    assert ratio.median == pytest.approx(
        rates["prefill 32", "inference-pio"] / rates["prefill 32", peer.name]
    )
    first = next(r for r in outcome.rows if r.unit == "ms" and r.system == peer.name)
    assert first.median == pytest.approx(32_000 / rates["prefill 32", peer.name])
    memory = {r.system: r.median for r in outcome.rows if r.unit == "MiB"}
    assert min(memory.values()) > 50  # an interpreter with torch is more
    assert any(note.startswith("broken is not measured") for note in outcome.notes)
    assert any("no such kernel" in note for note in outcome.notes)
    best = comparison.fastest_other(outcome.rows, "inference-pio")
    assert [row.case for row in best] == ["decode b2", "prefill 32"]


def becomes(child: psutil.Process, status: str) -> bool:
    """A signal is delivered a moment after it was sent."""
    for _ in range(500):
        if child.status() == status:
            return True
        time.sleep(0.01)
    return False


def test_who_waits_is_stopped_and_who_dies_says_so(own: PeerProcess) -> None:
    (child,) = [p for p in psutil.Process().children() if "own_peer" in " ".join(p.cmdline())]
    assert becomes(child, psutil.STATUS_STOPPED)
    assert own.decode_rate(2, 8, 4) > 0
    assert becomes(child, psutil.STATUS_STOPPED)
    child.kill()
    with pytest.raises(PeerUnavailableError, match="ended"):
        own.prefill_rate(16)
    assert not own.is_alive


def test_systems_end_with_the_process_that_measures(embedded_dir: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from inference_pio.benchmarks.compare.catalog import catalog\n"
        "from inference_pio.benchmarks.compare.process import PeerProcess\n"
        "folder, checkpoint = map(Path, sys.argv[1:])\n"
        "spec = catalog()['inference-pio']\n"
        "system = PeerProcess(spec, checkpoint, 'bfloat16', 1, folder)\n"
        "system.start(lambda _: None)\n"
        "print(system._process.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, tmp_path / "own", embedded_dir],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as measuring:
        assert measuring.stdout is not None
        child = psutil.Process(int(measuring.stdout.readline()))
        assert becomes(child, psutil.STATUS_STOPPED)
        measuring.kill()
    gone, _ = psutil.wait_procs([child], timeout=10)
    assert gone == [child]


@pytest.mark.slow
def test_an_environment_is_made_once_and_a_failed_one_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "tiny"
    package.mkdir()
    (package / "tiny.py").write_text("VALUE = 1\n", encoding="utf-8")
    (package / "setup.py").write_text(
        "from setuptools import setup\nsetup(name='tiny', version='1', py_modules=['tiny'])\n",
        encoding="utf-8",
    )
    spec = PeerSpec("tiny", "tiny_peer.py", (), (str(package / "absent"),))
    with pytest.raises(PeerUnavailableError, match="absent"):
        install.interpreter(spec, lambda _: None)
    spec = replace(spec, requirements=(str(package),))
    said: list[str] = []
    python = install.interpreter(spec, said.append)
    assert python != Path(sys.executable)
    assert said
    said.clear()
    assert install.interpreter(spec, said.append) == python
    assert not said
