from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from inference_pio.deployments import logs


@pytest.fixture(autouse=True)
def _fresh_configuration() -> Iterator[None]:
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    captured = capsys.readouterr()
    assert captured.out == ""
    return [json.loads(line) for line in captured.err.splitlines()]


def test_a_line_is_json_with_level_time_and_component(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info")
    logs.get_logger("ingress").info("request_finished", tokens=12)
    (line,) = lines(capsys)
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "request_finished",
        "level": "info",
        "component": "ingress",
        "tokens": 12,
    }


def test_what_people_wrote_is_dropped_unless_debugging(
    capsys: pytest.CaptureFixture[str],
) -> None:
    secrets = dict.fromkeys(logs.PRIVATE_KEYS, "my secret")
    logs.configure("info")
    logs.get_logger("ingress").warning("refused", **secrets)
    assert "my secret" not in json.dumps(lines(capsys))
    logs.configure("debug")
    logs.get_logger("ingress").debug("refused", prompt="my secret")
    assert lines(capsys)[0]["prompt"] == "my secret"


def test_lines_below_the_level_are_not_written(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("warning")
    logger = logs.get_logger("engine")
    logger.info("step")
    logger.error("dead")
    assert [line["event"] for line in lines(capsys)] == ["dead"]


def test_each_task_keeps_its_own_request_id(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info")

    async def handle(request_id: str) -> None:
        logs.bind_request(request_id)
        await asyncio.sleep(0)
        logs.get_logger("ingress").info(request_id)

    async def run() -> None:
        await asyncio.gather(*(handle(f"r{number}") for number in range(5)))

    asyncio.run(run())
    found = lines(capsys)
    assert len(found) == 5
    assert all(line["request_id"] == line["event"] for line in found)


def test_an_exception_is_one_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info")
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logs.get_logger("engine").exception("failed", value={1, 2})
    (line,) = lines(capsys)
    assert "ValueError: two\nlines" in line["exception"]


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match="'loud'; it is one of debug, info, warning, error"):
        logs.configure("loud")  # type: ignore[arg-type]
