"""Choice of items and rows; the run itself is tested against a real server with the commands."""

from __future__ import annotations

import pytest

from inference_pio.benchmarks.evaluation.data import DataError
from inference_pio.benchmarks.evaluation.evaluate import Evaluation, chosen_items, seed_of
from inference_pio.benchmarks.evaluation.item import Reply
from inference_pio.benchmarks.evaluation.results import Result
from inference_pio.benchmarks.evaluation.rows import notes, rows


@pytest.mark.usefixtures("task_sets")
def test_a_greater_limit_adds_to_the_choice() -> None:
    few = [item.id for item in chosen_items(["gsm8k"], 5, seed=1)]
    more = [item.id for item in chosen_items(["gsm8k"], 20, seed=1)]
    assert (len(few), len(set(more))) == (5, 20)
    assert more[:5] == few
    assert [item.id for item in chosen_items(["gsm8k"], 5, seed=2)] != few


@pytest.mark.usefixtures("task_sets")
def test_a_limit_holds_for_each_category() -> None:
    items = chosen_items(["humaneval", "bfcl"], 2, seed=0)
    assert [item.task for item in items] == ["humaneval"] * 2 + ["bfcl"] * 8
    assert len({item.category for item in items}) == 5
    assert len({seed_of(item, 0) for item in items}) == 10


def test_absent_data_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.delenv("INFERENCE_PIO_DATA", raising=False)
    with pytest.raises(DataError, match="INFERENCE_PIO_DATA is not set"):
        chosen_items(["gsm8k"], 1, 0)
    monkeypatch.setenv("INFERENCE_PIO_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"bench/HumanEval\.jsonl\.gz is not in the folder"):
        chosen_items(["humaneval"], 1, 0)


def test_damaged_data_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: object) -> None:
    assert isinstance(tmp_path_factory, pytest.TempPathFactory)
    folder = tmp_path_factory.mktemp("data")
    (folder / "bench").mkdir()
    monkeypatch.setenv("INFERENCE_PIO_DATA", str(folder))
    (folder / "bench" / "gsm8k_test.jsonl").write_text('{"question": "?", "answer": "1"}\n{')
    with pytest.raises(DataError, match=r"gsm8k_test\.jsonl, line 2"):
        chosen_items(["gsm8k"], 1, 0)
    (folder / "bench" / "HumanEval.jsonl.gz").write_text("no gzip")
    with pytest.raises(DataError, match=r"HumanEval\.jsonl\.gz"):
        chosen_items(["humaneval"], 1, 0)


def result(task: str, category: str, right: bool, reply: Reply) -> Result:
    return Result(task, "x", category, "thinking", reply, {"right": [right]})


def test_rows_and_notes() -> None:
    good = Reply("a", completion_tokens=30, reasoning_tokens=20, seconds=2.0, finish_reason="stop")
    cut = Reply("b", completion_tokens=50, reasoning_tokens=50, seconds=4.0, finish_reason="length")
    results = (
        result("gsm8k", "", True, good),
        result("gsm8k", "", False, cut),
        result("gsm8k", "", False, Reply(refusal="400: too long")),
        result("bfcl", "multiple", True, Reply("c", completion_tokens=7, seconds=1.0)),
    )
    evaluation = Evaluation("/models/mine", results)
    found = rows(evaluation, "bfloat16", "inference-pio bench accuracy")
    assert {row.system for row in found} == {"mine"}
    assert [(row.case, row.unit, round(row.median, 3)) for row in found] == [
        ("gsm8k, thinking", "right", 0.333),
        ("gsm8k, thinking", "thought tokens", 35.0),
        ("gsm8k, thinking", "answer tokens", 5.0),
        ("gsm8k, thinking", "s", 3.0),
        ("bfcl multiple, thinking", "right", 1.0),
        ("bfcl multiple, thinking", "tokens", 7.0),
        ("bfcl multiple, thinking", "s", 1.0),
    ]
    assert (round(found[0].low, 3), round(found[0].high, 3)) == (0.061, 0.792)
    assert notes(evaluation) == [
        "gsm8k, thinking: 3 items, 1 cut at the limit of tokens, "
        "1 refused and counted as wrong (400: too long)",
        "bfcl multiple, thinking: 1 item",
    ]
