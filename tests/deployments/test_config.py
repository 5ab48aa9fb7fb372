from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from inference_pio.deployments.config import ApiConfig, ServiceConfig, load_api_keys, load_config

LOCAL = Path(__file__).resolve().parents[2] / "cluster_configs" / "local.yaml"


def test_the_local_file_is_a_valid_application() -> None:
    (application,) = yaml.safe_load(LOCAL.read_text())["applications"]
    assert application["import_path"] == "inference_pio.deployments.app:build"
    config = load_config(application["args"])
    assert config.engine.model == "embedded"
    assert config.engine.block_size == 16
    assert config.model_name == "embedded"


def test_no_arguments_are_a_working_configuration() -> None:
    assert load_config({}) == ServiceConfig()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"engin": {}}, "'engine'"),
        ({"engine": {"block_sise": 16}}, "'block_size'"),
        ({"api": {"max_body": 1}}, "'max_body_bytes'"),
        ({"thinking": {"effort": {"hi": 1}}}, "'high'"),
        ({"thinking": {"sampling_profile": "wild"}}, "loop_averse"),
        ({"http": {"port": 70000}}, "http.port"),
        ({"replicas": {"ingress_replicas": 2}}, "ingress_replicas"),
        ({"api": {"max_prompts": 100}, "engine": {"max_waiting": 10}}, "max_waiting"),
        ({"pools": [{"name": "a"}, {"name": "a"}]}, "two pools are named 'a'"),
        ({"pools": [{"name": "A"}]}, "pools.0.name"),
        ({"pools": [{"modes": []}]}, "serves no mode"),
        ({"pools": [{"name": "ingress"}]}, "'ingress' is the name of the HTTP side"),
        ({"pools": [{"modes": ["quick"]}]}, "modes"),
        ({"pools": [{"role": "decode"}]}, "prefill.pool"),
        ({"pools": [{"role": "prefill"}]}, "nobody would answer"),
        ({"pools": [{"role": "decode", "prefill": {"pool": "p"}}]}, "prefill pools are: none"),
        (
            {
                "pools": [
                    {"name": "a"},
                    {"name": "b", "model": "x", "served_model_name": "embedded"},
                ]
            },
            "'x' as 'embedded'",
        ),
        ({"routing": {"auto_models": ["embedded", "big"]}}, "names 'big'"),
        (
            {"served_model_name": "auto", "routing": {"auto_models": ["auto", "auto"]}},
            "a model is named 'auto'",
        ),
        ({"routing": {"session_header": "X Session"}}, "session_header"),
        ({"thinking": {"default": "auto"}}, "no pool serves the mode auto"),
        ({"thinking": {"effort": {"low": 9000}}}, "low (9000)"),
    ],
)
def test_what_is_wrong_is_named(args: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match="configuration is wrong") as caught:
        load_config(args)
    assert said in str(caught.value)


def test_pools_share_the_engine_but_for_what_they_say() -> None:
    config = load_config(
        {
            "engine": {"block_size": 16},
            "served_model_name": "one",
            "pools": [
                {"name": "a", "engine": {"seed": 3}},
                {"name": "b", "model": "/m/two"},
                {"name": "c", "model": "/m/two", "served_model_name": "three"},
            ],
        }
    )
    engines = [config.engine_of(pool) for pool in config.pools]
    assert [engine.block_size for engine in engines] == [16, 16, 16]
    assert [engine.seed for engine in engines] == [3, 0, 0]
    assert [engine.model for engine in engines] == ["embedded", "/m/two", "/m/two"]
    names = [config.model_name_of(pool) for pool in config.pools]
    assert names == ["one", "/m/two", "three"]
    assert config.model_name == "one"


def test_pools_of_another_attention_exchange_no_kv() -> None:
    pools: list[dict[str, Any]] = [
        {"name": "p", "role": "prefill"},
        {"name": "d", "role": "decode", "prefill": {"pool": "p"}},
        {"name": "w", "engine": {"attention": {"kind": "sliding_window", "window": 512}}},
    ]
    config = load_config({"pools": pools, "engine": {"attention": "top_pages:4"}})
    assert config.approximations == {"d": "top_pages:4", "w": "sliding_window:512"}
    pools[1]["engine"] = {"attention": "full"}
    with pytest.raises(ValueError, match="attention is 'full' here and 'top_pages:4' there"):
        load_config({"pools": pools, "engine": {"attention": "top_pages:4"}})


def test_the_configuration_cannot_be_changed() -> None:
    config = load_config({})
    with pytest.raises(ValidationError):
        config.api.max_in_flight = 1  # type: ignore[misc]


def test_keys_come_from_file_and_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("INFERENCE_PIO_API_KEYS", raising=False)
    assert load_api_keys(ApiConfig()) == ()
    file = tmp_path / "keys"
    file.write_text("# people\nfirst-key-1\n\n  second-key-2  \n")
    monkeypatch.setenv("INFERENCE_PIO_API_KEYS", "third-key-3,")
    keys = load_api_keys(ApiConfig(keys_file=file))
    assert sorted(keys) == ["first-key-1", "second-key-2", "third-key-3"]


@pytest.mark.parametrize("text", ["", "# none\n", "short\n"])
def test_a_key_file_without_keys_is_no_open_door(text: str, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(ValueError, match="key"):
        load_api_keys(ApiConfig(keys_file=file, keys_env="INFERENCE_PIO_NOT_SET"))
    with pytest.raises(ValueError, match="cannot be read"):
        load_api_keys(ApiConfig(keys_file=tmp_path / "absent"))
