from __future__ import annotations

from pathlib import Path

import pytest

from inference_pio.benchmarks.evaluation.item import Reply, ToolCall
from inference_pio.benchmarks.evaluation.results import Result, Results

SETTINGS = {"model": "m", "seed": 0}
REPLY = Reply(
    content="höre\u2028 18\n",
    reasoning="so",
    tool_calls=(ToolCall("f", "{}"),),
    finish_reason="stop",
    completion_tokens=9,
    reasoning_tokens=4,
)


def result(number: int) -> Result:
    return Result("gsm8k", str(number), "", "thinking", REPLY, {"right": [True]})


def written(path: Path, *numbers: int) -> Path:
    with Results(path, SETTINGS) as results:
        for number in numbers:
            results.add(result(number))
    return path


def test_results_come_back(tmp_path: Path) -> None:
    path = written(tmp_path / "r", 1, 2)
    written(path, 3)
    with Results(path, SETTINGS) as results:
        assert list(results) == [result(1), result(2), result(3)]
        assert ("gsm8k", "2", "thinking") in results
        assert ("gsm8k", "2", "non-thinking") not in results
    assert len(path.read_text().split("\n")) == 1 + 3 + 1


def test_a_result_is_in_the_file_before_the_run_ends(tmp_path: Path) -> None:
    with Results(tmp_path / "r", SETTINGS) as results:
        results.add(result(1))
        assert '"id": "1"' in (tmp_path / "r").read_text()


@pytest.mark.parametrize("cut", [1, 20, 100])
def test_a_line_that_was_cut_is_asked_again(tmp_path: Path, cut: int) -> None:
    path = written(tmp_path / "r", 1, 2)
    path.write_bytes(path.read_bytes()[:-cut])
    with Results(path, SETTINGS) as results:
        assert list(results) == [result(1)]
        results.add(result(2))
    with Results(path, SETTINGS) as results:
        assert list(results) == [result(1), result(2)]


def test_a_file_cut_in_its_first_line_starts_anew(tmp_path: Path) -> None:
    path = written(tmp_path / "r")
    path.write_bytes(path.read_bytes()[:-5])
    written(path, 1)
    with Results(path, SETTINGS) as results:
        assert list(results) == [result(1)]


def test_results_of_another_run_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "r", 1)
    with pytest.raises(ValueError, match=r"results of another run: seed 0 \(now 1\)"):
        Results(path, {**SETTINGS, "seed": 1}).__enter__()


@pytest.mark.parametrize("line", ["[]", "{}", '{"task": 1}', "no"])
def test_a_line_that_is_no_result_is_refused(tmp_path: Path, line: str) -> None:
    path = written(tmp_path / "r", 1)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match="a line that is no result"):
        Results(path, SETTINGS).__enter__()


def test_without_a_file_results_are_kept_all_the_same() -> None:
    with Results(None, SETTINGS) as results:
        results.add(result(1))
        assert results["gsm8k", "1", "thinking"] == result(1)
