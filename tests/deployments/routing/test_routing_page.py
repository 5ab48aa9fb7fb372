"""What docs/routing.md says is so: its configuration loads, its header is what is sent.

Its Python examples run with those of the other pages, its table is checked beside the measure.
"""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import yaml

from inference_pio.deployments.api.errors import STATUS_OF_CODE
from inference_pio.deployments.config import load_config
from inference_pio.deployments.routing.complexity import WEIGHTS

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "routing.md").read_text(encoding="utf-8")
(CONFIGURATION,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_the_configuration_and_the_header_are_real(in_process_pools: Any) -> None:
    args = yaml.safe_load(CONFIGURATION)
    load_config(args)
    (header,) = re.findall(r"^(x-inference-pio-route): (.*)$", PAGE, re.MULTILINE)
    body = {"messages": [{"role": "user", "content": "What is 417 + 58 - 903?"}], "max_tokens": 2}

    async def main() -> None:
        async with in_process_pools(**args) as (client, _):
            answer = await client.post("/v1/chat/completions", json=body)
            assert answer.headers[header[0]] == header[1]

    asyncio.run(main())


def test_the_weights_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (0\.\d\d) \|", PAGE, re.MULTILINE)
    assert {name: float(weight) for name, weight in rows} == WEIGHTS


def test_the_statuses_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| .* \| (\d{3}) `(\w+)`", PAGE, re.MULTILINE)
    assert len(rows) == 4
    for status, code in rows:
        assert STATUS_OF_CODE.get(code, 400) == int(status)
