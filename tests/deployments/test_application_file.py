from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from inference_pio.deployments.application_file import Wishes, load_application, put_wishes


def write(folder: Path, text: str) -> Path:
    path = folder / "service.yaml"
    path.write_text(text)
    return path


MINIMAL = """
applications:
  - name: a
    import_path: inference_pio.deployments.app:build
    args:
      http: {port: 8100}
      engine: {max_num_seqs: 4}
"""


def test_the_default_file_serves_the_embedded_model_on_loopback() -> None:
    application = load_application(None, Wishes())
    assert application.config.engine.model == "embedded"
    assert (application.host, application.port) == ("127.0.0.1", 8000)
    assert application.document["http_options"]["port"] == 8000


def test_wishes_go_before_the_file_and_the_rest_stays(tmp_path: Path) -> None:
    wishes = Wishes(host="0.0.0.0", dtype="float32", served_model_name="mine")
    application = load_application(write(tmp_path, MINIMAL), wishes)
    assert (application.host, application.port) == ("0.0.0.0", 8100)
    assert application.config.engine.dtype == "float32"
    assert application.config.engine.max_num_seqs == 4
    assert application.config.model_name == "mine"
    # What Ray is told is what was checked.
    assert application.document["applications"][0]["args"]["engine"]["dtype"] == "float32"


def test_a_folder_becomes_absolute_and_keeps_its_typed_name(
    tmp_path: Path, embedded_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(embedded_dir, tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    application = load_application(None, Wishes(model="mine"))
    assert application.config.engine.model == str((tmp_path / "mine").resolve())
    assert application.config.model_name == "mine"


def test_put_wishes_leaves_its_input_alone() -> None:
    arguments = {"engine": {"model": "a"}}
    assert put_wishes(arguments, Wishes(model="b"))["engine"]["model"] == "b"
    assert arguments == {"engine": {"model": "a"}}


def test_an_empty_section_takes_a_wish() -> None:
    assert put_wishes({"engine": None}, Wishes(dtype="float32")) == {"engine": {"dtype": "float32"}}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("applications: [", "is not YAML"),
        ("[]", "one entry under 'applications'"),
        ("applications: []", "one entry under 'applications'"),
        ("applications: [{name: a}]", "needs an import_path"),
        (MINIMAL.replace("max_num_seqs", "max_num_sequences"), "did you mean 'max_num_seqs'"),
        (MINIMAL.replace("8100", "99999"), "http.port"),
    ],
)
def test_a_wrong_file_is_refused_with_its_reason(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        load_application(write(tmp_path, text), Wishes())


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        load_application(tmp_path / "absent.yaml", Wishes())
