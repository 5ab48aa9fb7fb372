"""``bench accuracy`` against the real service: its machinery, for this model knows no such task."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

COMMAND = str(Path(sys.executable).with_name("inference-pio"))
ASKED = ("--limit", "1", "--max-tokens", "40", "--seed", "3")


def run(url: str, data: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, "bench", "accuracy", "--url", url, *ASKED, *words],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "COLUMNS": "200", "INFERENCE_PIO_DATA": str(data)},
    )


def test_every_task_in_both_modes_and_again_from_its_results(
    service_url: str, data_dir: Path, tmp_path: Path
) -> None:
    kept, report = tmp_path / "kept.jsonl", tmp_path / "report.json"
    done = run(service_url, data_dir, "--results", str(kept), "--json", str(report))
    assert done.returncode == 0, done.stderr
    rows = json.loads(report.read_text())["rows"]
    shares = {row["case"]: row for row in rows if row["unit"] in ("right", "pass@1")}
    parts = {"gsm8k", "humaneval", "bfcl simple_python", "bfcl multiple", "bfcl parallel"}
    for part in parts:
        for mode in ("thinking", "non-thinking"):
            assert 0 <= shares[f"{part}, {mode}"]["median"] <= 1
    ifeval = {row["unit"] for row in rows if row["case"] == "ifeval, thinking"}
    assert {"prompt strict", "instruction strict", "prompt loose", "instruction loose"} <= ifeval
    thought = {row["case"] for row in rows if row["unit"] == "thought tokens"}
    assert "gsm8k, thinking" in thought
    assert "gsm8k, non-thinking" not in thought

    lines = kept.read_text()
    assert lines.count("\n") == 1 + 2 * 7
    kept.write_text(lines.rpartition('{"task"')[0])  # as if the last had not been asked
    again = run(service_url, data_dir, "--results", str(kept), "--json", str(report))
    assert again.returncode == 0, again.stderr
    assert "13 of 14 answered" in again.stderr
    assert kept.read_text().count("\n") == 1 + 2 * 7

    other = run(service_url, data_dir, "--results", str(kept), "--temperature", "0")
    assert other.returncode == 1
    assert "results of another run: temperature None (now 0.0)" in other.stderr


def test_absent_data_and_wrong_words_are_one_line(tmp_path: Path) -> None:
    absent = run("http://127.0.0.1:9", tmp_path, "--task", "gsm8k")
    assert absent.returncode == 1
    assert "bench/gsm8k_test.jsonl is not in the folder" in absent.stderr
    wrong = run("http://127.0.0.1:9", tmp_path, "--task", "mmlu")
    assert wrong.returncode == 1
    assert "--task 'mmlu' is not known: it is gsm8k or ifeval or humaneval or bfcl" in wrong.stderr
