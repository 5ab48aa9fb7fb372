"""The command as scripts use it: exit codes, what is on which stream; mostly in real processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from inference_pio.deployments.cli import console, main

COMMAND = str(Path(sys.executable).with_name("inference-pio"))


def run(
    *arguments: str, stdin: str = "", cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [COMMAND, *arguments],
        capture_output=True,
        text=True,
        input=stdin,
        timeout=120,
        check=False,
        env=environment,
        cwd=cwd,
    )


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """``run`` without a process, for the many words that end before there is anything to do.

    A new process takes most of a second to import what they need.
    """

    def run_main(*arguments: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", [COMMAND, *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return subprocess.CompletedProcess(sys.argv, ended.value.code, shown.out, shown.err)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(console.err, "width", 200)
    return run_main


def test_a_process_ends_with_the_status_and_the_streams_of_its_command() -> None:
    shown = run("--help")
    assert shown.returncode == 0
    assert "Usage: inference-pio" in shown.stdout
    check_failure(run("serve", "nowhere"), "there is no folder 'nowhere'")
    assert run("sing").returncode == 2


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["serve"],
        ["chat"],
        ["generate"],
        ["make-checkpoint"],
        ["quantize"],
        ["demo"],
        ["bench", "speed"],
        ["bench", "gpu"],
        ["bench", "serve"],
        ["bench", "accuracy"],
        ["bench", "memory"],
        ["bench", "quantization"],
        ["bench", "kernels"],
        ["bench", "offload"],
        ["bench", "table"],
    ],
)
def test_help_has_examples(words: list[str], run_here: Run) -> None:
    shown = run_here(*words, "--help")
    assert shown.returncode == 0
    assert "Usage: inference-pio" in shown.stdout
    if words:
        assert f"$ inference-pio {' '.join(words)}" in shown.stdout


def test_help_loads_neither_torch_nor_ray() -> None:
    code = (
        "import sys; from inference_pio.deployments.cli import main; sys.argv = ['x', '--help']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["serve", "nowhere"], "there is no folder 'nowhere'"),
        (["serve", "--config", "absent.yaml"], "absent.yaml"),
        (["generate", "hi", "--model", "nowhere"], "there is no folder 'nowhere'"),
        (["generate", "hi", "--temperature", "-1"], "temperature is -1.0"),
        (["make-checkpoint", "qwen3-0.6b", "out", "--tokenizer", "."], "tokenizer.json"),
        (["chat", "--url", "http://127.0.0.1:9"], "no server answers at http://127.0.0.1:9"),
        (["bench", "speed", "--picture", "p.pdf"], ".png or .svg"),
        pytest.param(
            ["bench", "gpu"],
            "bench gpu needs a CUDA device, but torch",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
        (["bench", "serve", "--rate", "2", "--offline"], "--rate is an open loop"),
        (["bench", "compare", "--case", "decode b3"], "one of decode b1, decode b8"),
        (["bench", "kernels", "--operation", "up"], "--operation 'up' is none of layer, qkv"),
        (["bench", "offload", "--engine", "weight_memory_bytes=1GiB"], "--keep says what stays"),
    ],
)
def test_an_error_is_one_line_without_a_traceback(
    words: list[str], reason: str, run_here: Run
) -> None:
    check_failure(run_here(*words), reason)


def test_a_hub_that_cannot_be_asked_is_told() -> None:
    """In a process: whether there is a hub is decided when its library is imported."""
    reason = "is not in the local cache and cannot be fetched from the hub"
    check_failure(run("serve", "org/model"), reason)


def check_failure(failed: subprocess.CompletedProcess[str], reason: str) -> None:
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert "Traceback" not in failed.stderr
    last = failed.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert reason in last


@pytest.mark.parametrize(
    "words", [["serve", "--port", "0"], ["serve", "--dtype", "int3"], ["sing"]]
)
def test_a_wrong_word_is_a_usage_error(words: list[str], run_here: Run) -> None:
    failed = run_here(*words)
    assert failed.returncode == 2
    assert "Traceback" not in failed.stderr


def test_generate_thinks_on_one_stream_and_answers_on_the_other() -> None:
    done = run("generate", "What is 12 + 34 - 5?", "--think", "--temperature", "0")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "41\n"
    assert "+0041" in done.stderr  # the running total of the thought


def test_generate_reads_standard_input_and_writes_json() -> None:
    done = run("generate", "-", "--no-think", "--json", "--temperature", "0", stdin="Hello!")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["content"]
    assert answer["reasoning"] is None
    assert answer["reasoning_tokens"] == 0
    assert answer["finish_reason"] == "stop"
    assert answer["completion_tokens"] > 0


def test_generate_from_a_folder_stops_at_its_limits(embedded_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(embedded_dir, tmp_path / "model")
    words = ("--model", "model", "--raw", "--max-tokens", "3", "--json", "--seed", "1")
    first = run("generate", "abc", *words, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout)["completion_tokens"] <= 3
    assert run("generate", "abc", *words, cwd=tmp_path).stdout == first.stdout


def test_a_budget_ends_the_thought() -> None:
    words = ("--think", "--budget", "5", "--json", "--temperature", "0")
    done = run("generate", "What is 12 + 34 - 5 + 77?", *words)
    assert done.returncode == 0, done.stderr
    assert 0 < json.loads(done.stdout)["reasoning_tokens"] <= 200


def test_quantize_writes_a_checkpoint_that_answers(tmp_path: Path, run_here: Run) -> None:
    done = run("quantize", "embedded", "out", "--format", "int8", cwd=tmp_path)
    assert done.returncode == 0
    assert "GiB in int8" in done.stderr
    question = ["generate", "What is 100 + 20 + 3?", "--model", "out", "--temperature", "0"]
    assert run(*question, cwd=tmp_path).stdout.strip() == "123"
    again = run_here("quantize", "embedded", "out", "--format", "int8")
    assert again.returncode == 1
    assert "out exists; a new folder is expected" in again.stderr


def test_a_limit_for_weights_is_a_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_here: Run
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = ("generate", "What is 12 + 34 - 5?", "--json", "--engine")
    streamed = run(*asked, "weight_memory_bytes=1.5MB")
    low, wrong = (run_here(*asked, f"weight_memory_bytes={size}") for size in ("1KiB", "much"))
    assert json.loads(streamed.stdout)["content"] == "41"
    assert (low.returncode, wrong.returncode) == (1, 1)
    assert "weight_memory_bytes is 1024; at least " in low.stderr
    assert "could not parse value and unit" in wrong.stderr
