from __future__ import annotations

import dataclasses
import json
import socket
from pathlib import Path

import pytest

from inference_pio.benchmarks.report import (
    Report,
    Row,
    describe_machine,
    markdown_table,
    of_requests,
    of_rounds,
)

ROW = Row(
    benchmark="speed",
    system="inference-pio",
    precision="bfloat16",
    case="decode b1",
    unit="tok/s",
    median=40.5,
    low=38.0,
    high=41.0,
    floor_share=0.85,
    command="inference-pio bench speed",
)


def test_a_report_comes_back_as_it_was_written(tmp_path: Path) -> None:
    report = Report(describe_machine(), (ROW, dataclasses.replace(ROW, floor_share=None)))
    report.write(tmp_path / "r.json")
    assert Report.read(tmp_path / "r.json") == report


def test_the_json_has_the_form_that_scripts_read() -> None:
    document = json.loads(Report(describe_machine(), (ROW,)).to_json())
    assert document["schema"] == 1
    assert list(document) == ["schema", "machine", "rows", "notes"]
    assert list(document["rows"][0]) == [
        "benchmark",
        "system",
        "precision",
        "case",
        "unit",
        "median",
        "low",
        "high",
        "floor_share",
        "command",
    ]


def test_the_machine_names_hardware_and_versions_but_neither_host_nor_path(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("INFERENCE_PIO_KERNELS", "reference")
    machine = describe_machine()
    assert machine.cpu
    assert machine.cores >= 1
    assert machine.versions["torch"][0].isdigit()
    assert machine.kernels == "reference"
    text = json.dumps(dataclasses.asdict(machine))
    assert socket.gethostname() not in text
    assert str(Path.home()) not in text


@pytest.mark.parametrize("text", ['{"schema": 2}', "[]", '{"schema": 1, "rows": [{}]}'])
def test_another_form_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="is not a report of schema 1"):
        Report.read(path)


def test_spreads() -> None:
    rounds = of_rounds([3.0, 1.0, 2.0])
    assert (rounds.median, rounds.low, rounds.high) == (2.0, 1.0, 3.0)
    requests = of_requests([float(value) for value in range(101)])
    assert (requests.median, requests.low, requests.high) == (50.0, 1.0, 99.0)
    single = of_requests([7.0])
    assert (single.median, single.low, single.high) == (7.0, 7.0, 7.0)


def test_the_table_names_each_command_once() -> None:
    table = markdown_table([ROW, dataclasses.replace(ROW, case="decode b8", floor_share=None)])
    assert "| decode b1 | 40.5 | 38 to 41 | tok/s | 0.85 |" in table
    assert table.count("`inference-pio bench speed`") == 1
