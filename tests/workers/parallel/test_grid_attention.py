"""Windows and pages on a grid: every rank sees what one process would see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

MakeDriver = Callable[..., Any]
Prompt = Callable[..., list[int]]

GREEDY: dict[str, Any] = {
    "temperature": 0.0,
    "repetition_penalty": 1.5,
    "ignore_eos": True,
    "loop_guard": False,
}


@pytest.mark.parametrize("attention", ["sink_window:20+4", "top_pages:2"])
@pytest.mark.parametrize(
    "parallel",
    [{"tensor": 2}, {"pipeline": 2, "micro_batches": 3}, {"tensor": 2, "sequence_from": 20}],
)
def test_a_grid_gives_what_one_process_gives(
    make_driver: MakeDriver,
    make_grid: MakeDriver,
    prompt: Prompt,
    parallel: dict[str, int],
    attention: str,
) -> None:
    texts = []
    for driver in (
        make_driver(attention=attention),
        make_grid(attention=attention, parallel=parallel),
    ):
        for name, length in (("long", 150), ("short", 9)):
            driver.add(name, prompt(length), max_tokens=40, **GREEDY)
        driver.run()
        texts.append([driver.tokens(name) for name in ("long", "short")])
    assert texts[1] == texts[0]
