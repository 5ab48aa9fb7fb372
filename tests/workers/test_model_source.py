from __future__ import annotations

import json
from pathlib import Path

import pytest

from inference_pio.workers.model_source import ModelSourceError, resolve_model

CONFIG = "config.json"


def test_embedded_is_the_folder_in_the_package(embedded_dir: Path) -> None:
    assert resolve_model("embedded") == embedded_dir


def test_a_folder_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / CONFIG).write_text("{}")
    monkeypatch.chdir(tmp_path.parent)
    assert resolve_model(tmp_path.name) == tmp_path.resolve()


@pytest.mark.parametrize("name", ["nowhere", "../../up", "a/b/c", "org/na me", ""])
def test_a_name_that_is_neither_folder_nor_hub_name_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tmp_path / "x" / "y"
    empty.mkdir(parents=True)
    monkeypatch.chdir(empty)
    with pytest.raises(ModelSourceError):
        resolve_model(name)


def test_a_file_and_an_empty_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ModelSourceError, match=f"holds no {CONFIG}"):
        resolve_model(str(tmp_path))
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(ModelSourceError, match="is a file"):
        resolve_model(str(file))


def hub_snapshot(cache: Path, files: dict[str, str]) -> Path:
    """A download as huggingface_hub leaves it in its cache."""
    repository = cache / "models--org--model"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    for name, text in files.items():
        (snapshot / name).write_text(text)
    return snapshot


@pytest.fixture
def offline_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def test_a_complete_download_needs_no_hub(offline_hub: Path) -> None:
    index = json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}})
    files = {CONFIG: "{}", "tokenizer.json": "{}", "model.safetensors.index.json": index}
    snapshot = hub_snapshot(offline_hub, {**files, "1.safetensors": "", "2.safetensors": ""})
    assert resolve_model("org/model") == snapshot


def test_without_hub_and_cache_the_error_says_what_to_do(offline_hub: Path) -> None:
    with pytest.raises(ModelSourceError, match=r"pass its folder, or use 'embedded'$"):
        resolve_model("org/model")
