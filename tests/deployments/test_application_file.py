from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from inference_pio.deployments.application_file import (
    DEFAULT_FILE,
    Wishes,
    load_application,
    put_wishes,
)


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
    wishes = Wishes(
        host="0.0.0.0",
        served_model_name="mine",
        engine={"dtype": "float32", "weight_memory_bytes": 2**30, "loop_guard": {"min_repeats": 9}},
    )
    application = load_application(write(tmp_path, MINIMAL), wishes)
    assert (application.host, application.port) == ("0.0.0.0", 8100)
    assert application.config.engine.dtype == "float32"
    assert application.config.engine.weight_memory_bytes == 2**30
    assert application.config.engine.loop_guard.min_repeats == 9
    assert application.config.engine.loop_guard.max_period == 256
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


POOLS = """
applications:
  - name: a
    import_path: inference_pio.deployments.app:build
    args:
      engine: {max_model_len: 16384, dtype: bfloat16}
      pools:
        - {name: small, model: one/small, modes: [thinking], engine: {dtype: float32}}
        - {name: large, model: one/large, served_model_name: big, engine: {max_model_len: 64}}
"""


def test_a_model_goes_into_every_pool_and_public_names_stay(tmp_path: Path) -> None:
    config = load_application(write(tmp_path, POOLS), Wishes(model="embedded")).config
    assert {config.engine_of(pool).model for pool in config.pools} == {"embedded"}
    assert [config.model_name_of(pool) for pool in config.pools] == ["one/small", "big"]


def test_a_model_takes_the_place_of_one_other_with_its_name(tmp_path: Path) -> None:
    text = POOLS.replace("one/large, served_model_name: big", "one/small")
    config = load_application(write(tmp_path, text), Wishes(model="embedded")).config
    assert {config.model_name_of(pool) for pool in config.pools} == {"embedded"}


def test_lengths_meant_for_a_larger_model_are_lowered_to_its_own(tmp_path: Path) -> None:
    config = load_application(write(tmp_path, POOLS), Wishes(model="embedded")).config
    assert [config.engine_of(pool).max_model_len for pool in config.pools] == [4096, 64]


def test_a_dtype_goes_into_every_pool(tmp_path: Path) -> None:
    wishes = Wishes(model="embedded", engine={"dtype": "float16", "quantization": "nf4"})
    config = load_application(write(tmp_path, POOLS), wishes).config
    assert {config.engine_of(pool).dtype for pool in config.pools} == {"float16"}
    assert {config.engine_of(pool).quantization for pool in config.pools} == {"nf4"}


def test_folders_of_pools_become_absolute_and_keep_their_typed_names(
    tmp_path: Path, embedded_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(embedded_dir, tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    text = MINIMAL + "      pools: [{name: a, model: mine}, {name: b, modes: [thinking]}]\n"
    application = load_application(write(tmp_path, text), Wishes())
    own, common = application.config.pools
    assert application.config.engine_of(own).model == str((tmp_path / "mine").resolve())
    assert application.config.model_name_of(own) == "mine"
    assert application.config.engine_of(common).model == "embedded"
    assert application.config.model_name_of(common) == "embedded"


def test_a_folder_that_no_pool_uses_need_not_exist(tmp_path: Path) -> None:
    text = MINIMAL.replace("{max_num_seqs: 4}", "{model: absent/model}")
    text += "      pools: [{name: a, model: embedded}]\n"
    config = load_application(write(tmp_path, text), Wishes()).config
    assert config.model_name == "embedded"


@pytest.mark.parametrize("name", ["disaggregated", "full", "local", "qwen3-4b-tp2-pp2"])
def test_every_topology_of_ours_runs_on_the_embedded_model(name: str) -> None:
    file = DEFAULT_FILE.with_name(f"{name}.yaml")
    config = load_application(file, Wishes(model="embedded", engine={"dtype": "auto"})).config
    assert {config.engine_of(pool).model for pool in config.pools} == {"embedded"}
    assert len(config.pools) == len(
        yaml.safe_load(file.read_text())["applications"][0]["args"].get("pools", [None])
    )


@pytest.mark.parametrize("name", ["disaggregated", "full", "local", "qwen3-4b-tp2-pp2"])
def test_serve_itself_accepts_the_same_file(name: str) -> None:
    document = yaml.safe_load(DEFAULT_FILE.with_name(f"{name}.yaml").read_text())
    assert set(document) == {"applications", "http_options"}
    # What Serve listens on where `inference-pio serve` does not decide it is written down.
    assert set(document["http_options"]) == {"host", "port"}


def test_an_empty_section_takes_a_wish() -> None:
    wishes = Wishes(engine={"dtype": "float32"})
    assert put_wishes({"engine": None}, wishes) == {"engine": {"dtype": "float32"}}


def test_a_key_of_a_section_leaves_the_others_of_every_pool() -> None:
    arguments = {
        "engine": {"loop_guard": {"min_repeats": 5, "min_tokens": 50}, "attention": "full"},
        "pools": [{"name": "a", "engine": {"loop_guard": {"min_repeats": 6, "max_period": 9}}}],
    }
    wishes = Wishes(engine={"loop_guard": {"min_repeats": 7}, "attention": {"kind": "top_pages"}})
    assert put_wishes(arguments, wishes) == {
        "engine": {
            "loop_guard": {"min_repeats": 7, "min_tokens": 50},
            "attention": {"kind": "top_pages"},
        },
        "pools": [{"name": "a", "engine": {"loop_guard": {"max_period": 9}}}],
    }


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
