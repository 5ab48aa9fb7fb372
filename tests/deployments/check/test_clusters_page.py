"""What docs/clusters.md says is so: its files, its YAML, the commands it has people type."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from inference_pio.deployments.config import PoolConfig

REPOSITORY = Path(__file__).parents[3]
PAGE = (REPOSITORY / "docs/clusters.md").read_text(encoding="utf-8")
CONFIGS = REPOSITORY / "cluster_configs"

PARSE = """
import json, sys, click
from ray.scripts.scripts import cli as ray
from ray.serve.scripts import cli as serve

group = {"ray": ray, "serve": serve}[sys.argv[1]]
for name, *words in json.loads(sys.argv[2]):
    command = group.get_command(click.Context(group), name)
    assert command is not None, f"there is no command {name}"
    # Parsing knows the options and how many arguments there may be; nothing is run.
    command.make_context(name, words)
"""
"""In a process of its own, for Ray Serve warns."""


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    return [text for name, text in found if name == language]


def commands(program: str) -> list[str]:
    """Lines of a shell that begin with ``program``, also where an environment is set before."""
    lines = [line for block in blocks("") for line in block.splitlines()]
    inner = re.findall(r"'(?:\w+=\S+ )+([^']+)'", PAGE)
    return [line for line in [*lines, *inner] if line.startswith(f"{program} ")]


def test_every_cluster_file_is_described_and_every_described_one_exists() -> None:
    table = PAGE.split("## Check")[0]
    told = set(re.findall(r"`([\w-]+\.yaml)`", table))
    assert told == {path.name for path in CONFIGS.glob("*.yaml")}


@pytest.mark.parametrize("program", ["ray", "serve"])
def test_the_commands_and_their_options_exist(program: str) -> None:
    found = [shlex.split(line)[1:] for line in commands(program)]
    assert found
    parse = [sys.executable, "-c", PARSE, program, json.dumps(found)]
    ended = subprocess.run(parse, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_the_files_that_commands_name_exist() -> None:
    named = re.findall(r"(cluster_configs/[\w-]+\.yaml)", "\n".join(blocks("")))
    assert named
    assert all((REPOSITORY / name).is_file() for name in named)


def test_its_pools_are_pools() -> None:
    (text,) = [block for block in blocks("yaml") if block.startswith("pools:")]
    (pool,) = yaml.safe_load(text)["pools"]
    assert PoolConfig.model_validate(pool).resources == {"prefill": 1}


def test_the_image_installs_what_the_wheel_line_makes() -> None:
    (image,) = blocks("dockerfile")
    copied = re.findall(r"^COPY (\S+) (\S+)", image, re.MULTILINE)
    assert copied == [("dist/", "/tmp/dist/")]
    for path in re.findall(r"/tmp/dist/(\S+)", image.split("COPY", 1)[1].split("\n", 1)[1]):
        assert path in ("constraints.txt", "inference_pio-*.whl")
    assert "pip wheel --no-deps -w dist . && cp constraints.txt dist" in PAGE
