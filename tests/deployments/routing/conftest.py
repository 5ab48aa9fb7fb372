"""A second model for routing tests."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest


@pytest.fixture
def never_thinks(tmp_path: Path, embedded_dir: Path) -> Path:
    """The embedded checkpoint with a template that has no thinking, as 4B-Instruct-2507's."""
    folder = tmp_path / "instruct"
    shutil.copytree(embedded_dir, folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings["chat_template"] = settings["chat_template"].replace("enable_thinking", "no_such")
    file.write_text(json.dumps(settings))
    return folder
