from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from inference_pio.deployments.check.nodes import NodeType, parse_bytes, parse_cpus
from inference_pio.deployments.check.review import Review, review_file
from inference_pio.deployments.cli.check import run_check

CONFIGS = Path(__file__).resolve().parents[3] / "cluster_configs"
FILES = sorted(path.name for path in CONFIGS.glob("*.yaml"))
SERVE_FILES = ["disaggregated.yaml", "full.yaml", "local.yaml", "qwen3-4b-tp2-pp2.yaml"]
BIG = NodeType("this machine", 1, {"CPU": 64}, 2**40)


@pytest.fixture(autouse=True)
def big_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an application needs does not depend on the machine that the tests run on."""
    monkeypatch.setattr("inference_pio.deployments.check.review.this_machine", lambda _config: BIG)


def load(name: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((CONFIGS / name).read_text())
    return document


def review(folder: Path, document: dict[str, Any]) -> Review:
    for name in SERVE_FILES:
        (folder / name).write_text((CONFIGS / name).read_text())
    path = folder / "checked.yaml"
    path.write_text(yaml.safe_dump(document))
    return review_file(path)


def errors(result: Review) -> str:
    return " | ".join(f"{p.key}: {p.message}" for p in result.problems if p.is_error)


def warnings(result: Review) -> str:
    return " | ".join(f"{p.key}: {p.message}" for p in result.problems if not p.is_error)


@pytest.mark.parametrize("name", FILES)
def test_every_file_of_ours_is_sound_and_without_a_warning(name: str) -> None:
    result = review_file(CONFIGS / name)
    assert result.problems == ()
    assert result.plan is not None
    assert all(pool.memory is not None for pool in result.pools)


# --- Serve applications ---------------------------------------------------------------------------


def args(document: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = document["applications"][0]["args"]
    return found


def test_unknown_keys_are_named_with_place_and_nearest(tmp_path: Path) -> None:
    document = load("disaggregated.yaml")
    document["http_option"] = {}
    document["applications"][0]["arg"] = {}
    args(document)["engine"]["max_num_sequences"] = 4
    found = errors(review(tmp_path, document))
    assert "http_option: unknown key; did you mean 'http_options'?" in found
    assert "applications[0].arg: unknown key; did you mean 'args'?" in found
    assert "applications[0].args.engine" in found
    assert "did you mean 'max_num_seqs'" in found


def test_an_unknown_key_of_a_pools_engine(tmp_path: Path) -> None:
    document = load("disaggregated.yaml")
    args(document)["pools"][2]["engine"]["max_sequences"] = 4
    assert "max_sequences" in errors(review(tmp_path, document))


def test_a_tensor_degree_that_the_model_has_no_heads_for(tmp_path: Path) -> None:
    document = load("qwen3-4b-tp2-pp2.yaml")
    args(document)["engine"]["parallel"]["tensor"] = 3
    found = errors(review(tmp_path, document))
    assert "pools.large" in found
    assert "cannot be split over 3" in found


def test_memory_that_this_machine_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = NodeType("this machine", 1, {"CPU": 64}, 8 * 2**30)
    monkeypatch.setattr(
        "inference_pio.deployments.check.review.this_machine", lambda _config: small
    )
    found = errors(review(tmp_path, load("disaggregated.yaml")))
    assert "3.69 GiB" in found
    assert "left are this machine" in found


def test_a_model_that_is_not_known_is_a_warning(tmp_path: Path) -> None:
    document = load("qwen3-4b-tp2-pp2.yaml")
    args(document)["engine"]["model"] = "someone/else"
    result = review(tmp_path, document)
    assert result.is_sound
    assert "memory unchecked" in warnings(result)


def test_an_attention_that_approximates_is_a_warning(tmp_path: Path) -> None:
    document = load("local.yaml")
    args(document).setdefault("engine", {})["attention"] = "sliding_window:512"
    result = review(tmp_path, document)
    assert result.is_sound
    said = "attention is sliding_window:512: answers are approximations of the model"
    assert warnings(result) == f"applications[0].args.pools.engine: {said}"


def test_another_import_path_is_refused(tmp_path: Path) -> None:
    document = load("local.yaml")
    document["applications"][0]["import_path"] = "deployments.app:build"
    assert "inference_pio.deployments.app:build" in errors(review(tmp_path, document))


# --- ray up ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ray-up-local.yaml", "ray-up-aws.yaml", "ray-up-gcp.yaml"])
def test_an_unknown_key_of_a_cluster_file(tmp_path: Path, name: str) -> None:
    document = load(name)
    document["setup_command"] = []
    found = errors(review(tmp_path, document))
    assert "setup_command: unknown key; did you mean 'setup_commands'?" in found


def test_an_unknown_key_of_a_node_type(tmp_path: Path) -> None:
    document = load("ray-up-aws.yaml")
    document["available_node_types"]["decode"]["min_worker"] = 1
    found = errors(review(tmp_path, document))
    assert "available_node_types.decode.min_worker" in found
    assert "'min_workers'" in found


def test_a_wrong_type_is_named_with_its_place(tmp_path: Path) -> None:
    document = load("ray-up-gcp.yaml")
    document["max_workers"] = "three"
    assert "max_workers: 'three' is not of type 'integer'" in errors(review(tmp_path, document))


def test_more_replicas_than_the_nodes_hold(tmp_path: Path) -> None:
    document = load("ray-up-aws.yaml")
    application = load("disaggregated.yaml")
    args(application)["pools"][1] |= {"replicas": 3, "resources": {"decode": 1}}
    document["metadata"]["application"] = "mine.yaml"
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(application))
    found = errors(review(tmp_path, document))
    assert "mine.yaml: applications[0].args.pools.thinking: no room for thinking[2]" in found


def test_a_strict_pack_that_no_node_type_can_hold(tmp_path: Path) -> None:
    document = load("ray-up-aws.yaml")
    application = load("qwen3-4b-tp2-pp2.yaml")
    args(application)["pools"][0]["num_cpus"] = 8
    document["metadata"]["application"] = "mine.yaml"
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(application))
    assert "STRICT_PACK puts 4 ranks on one node: they need 32 CPU" in errors(
        review(tmp_path, document)
    )


@pytest.mark.parametrize(
    ("transport", "reason"), [("nccl", "is refused: a transfer"), ("cuda_ipc", "is refused: it")]
)
def test_a_transport_that_no_build_has(tmp_path: Path, transport: str, reason: str) -> None:
    document = load("disaggregated.yaml")
    args(document)["pools"][1]["prefill"]["transport"] = transport
    assert f"pools.thinking: prefill.transport '{transport}' {reason}" in errors(
        review(tmp_path, document)
    )


def test_a_transport_whose_package_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nixl", None)
    application = load("disaggregated.yaml")
    args(application)["pools"][1]["prefill"]["transport"] = "nixl"
    assert "'nixl' needs the package nixl: pip install" in errors(review(tmp_path, application))
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(application))
    document = load("ray-up-aws.yaml")
    document["metadata"]["application"] = "mine.yaml"
    result = review(tmp_path, document)
    assert "pip install" not in errors(result)
    assert "not on this machine; each node needs it" in warnings(result)


def test_a_missing_application_is_named(tmp_path: Path) -> None:
    document = load("ray-up-local.yaml")
    document["metadata"]["application"] = "absent.yaml"
    assert "metadata.application" in errors(review(tmp_path, document))


def test_hosts_without_a_size_are_a_warning(tmp_path: Path) -> None:
    document = load("ray-up-local.yaml")
    del document["metadata"]["host"]
    result = review(tmp_path, document)
    assert result.is_sound
    assert "metadata.host: is missing" in warnings(result)


def test_own_hosts_need_addresses(tmp_path: Path) -> None:
    document = load("ray-up-local.yaml")
    del document["provider"]["worker_ips"]
    assert "provider.worker_ips: is missing" in errors(review(tmp_path, document))


@pytest.mark.parametrize("key", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_a_start_without_our_environment_is_a_warning(tmp_path: Path, key: str) -> None:
    document = load("ray-up-local.yaml")
    document[key] = ["RAY_SERVE_ENABLE_HA_PROXY=1 ray start --head"]
    found = warnings(review(tmp_path, document))
    assert f"{key}: does not run inference_pio.deployments.node_environment" in found
    assert "sets RAY_SERVE_ENABLE_HA_PROXY" in found


# --- KubeRay --------------------------------------------------------------------------------------


def cluster(document: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = document["spec"]["rayClusterConfig"]
    return found


def test_unknown_keys_of_a_rayservice(tmp_path: Path) -> None:
    document = load("kuberay.yaml")
    document["spec"]["serveConfig"] = ""
    cluster(document)["workerGroupSpec"] = []
    cluster(document)["workerGroupSpecs"][0]["replica"] = 1
    found = errors(review(tmp_path, document))
    assert "spec.serveConfig: unknown key; did you mean 'serveConfigV2'?" in found
    assert "spec.rayClusterConfig.workerGroupSpec: unknown key" in found
    assert "workerGroupSpecs[0].replica: unknown key; did you mean 'replicas'?" in found


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: d.update(apiVersion="ray.io/v1alpha1"), "apiVersion: must be ray.io/v1"),
        (lambda d: d["spec"].update(serveConfigV2={}), "must be the text of a Serve application"),
        (lambda d: cluster(d).update(rayVersion="2.9.0"), "rayVersion: is 2.9.0"),
        (lambda d: cluster(d).pop("headGroupSpec"), "headGroupSpec: is missing"),
        (lambda d: d["metadata"].pop("annotations"), "overwrite-container-cmd"),
        (
            lambda d: cluster(d)["headGroupSpec"]["template"]["spec"].update(containers=[]),
            "headGroupSpec: cannot be read",
        ),
    ],
)
def test_what_a_rayservice_needs(tmp_path: Path, change: Any, reason: str) -> None:
    document = load("kuberay.yaml")
    change(document)
    assert reason in errors(review(tmp_path, document))


def test_pods_that_are_too_small(tmp_path: Path) -> None:
    document = load("kuberay.yaml")
    for group in cluster(document)["workerGroupSpecs"]:
        group["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"] = "4Gi"
    found = errors(review(tmp_path, document))
    assert "4.00 GiB" in found
    assert "spec.serveConfigV2: applications[0].args.pools.prefill" in found


def test_pods_without_a_token_are_a_warning(tmp_path: Path) -> None:
    document = load("kuberay.yaml")
    del cluster(document)["authOptions"]
    assert "authOptions.mode" in warnings(review(tmp_path, document))


# --- all of it ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["a: [", "- 1", "a: 1"])
def test_another_file_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        review_file(path)


@pytest.mark.parametrize(
    ("text", "size"), [("64GiB", 64 * 2**30), ("16Gi", 2**34), ("1.5 GB", 1_500_000_000), (7, 7)]
)
def test_sizes(text: Any, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(("text", "cpus"), [("8", 8), (2, 2), ("500m", 0.5)])
def test_cpus(text: Any, cpus: float) -> None:
    assert parse_cpus(text) == cpus


@pytest.mark.parametrize("text", ["much", None, "12 parsecs", True])
def test_what_is_no_size_is_refused(text: Any) -> None:
    with pytest.raises(ValueError, match="no size"):
        parse_bytes(text)


def test_the_command_says_file_and_key_and_ends_with_1(tmp_path: Path) -> None:
    document = load("local.yaml")
    args(document)["engine"]["max_num_seq"] = 4
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(document))
    command = [sys.executable, "-c", "from inference_pio.deployments.cli import main; main()"]
    done = subprocess.run([*command, "check", str(path)], capture_output=True, text=True)
    assert done.returncode == 1
    assert f"{path}: applications[0].args.engine" in done.stdout.replace("\n", " ")
    assert "did you mean 'max_num_seqs'" in done.stdout.replace("\n", " ")


def test_the_command_draws(tmp_path: Path) -> None:
    out = tmp_path / "drawn.svg"
    assert run_check(CONFIGS / "ray-up-local.yaml", out) == 0
    assert ElementTree.parse(out).getroot().tag.endswith("svg")
