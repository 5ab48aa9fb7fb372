from __future__ import annotations

import random
from typing import Any

import pytest

from inference_pio.deployments.check.demand import replica_groups
from inference_pio.deployments.check.memory import RankMemory
from inference_pio.deployments.check.nodes import NodeType
from inference_pio.deployments.check.plan import Plan, place
from inference_pio.deployments.config import load_config

GIB = 2**30


def plan(pools: list[dict[str, Any]], nodes: list[NodeType], gib: float = 1.0) -> Plan:
    """Every rank takes ``gib`` in all."""
    config = load_config({"pools": pools})
    groups = replica_groups(config)
    return place(
        [(group, [rank_memory(rank, gib) for rank in range(group.num_ranks)]) for group in groups],
        nodes,
    )


def rank_memory(rank: int, gib: float) -> RankMemory:
    empty = RankMemory(rank, 0, 0)
    return RankMemory(rank, int(gib * GIB) - empty.total, 0)


def grid(tensor: int, **fields: Any) -> dict[str, Any]:
    return {"name": "grid", "engine": {"parallel": {"tensor": tensor}}, **fields}


def node(cpus: float = 4, gib: float = 8, count: int = 1, **resources: float) -> NodeType:
    return NodeType("node", count, {"CPU": cpus, **resources}, int(gib * GIB))


def held(result: Plan) -> list[int]:
    return [len(n.ranks) for n in result.nodes]


def reasons(result: Plan) -> str:
    return " | ".join(p.message for p in result.problems if p.is_error)


def test_replicas_spread_over_nodes() -> None:
    assert held(plan([{"name": "a", "replicas": 3}], [node(count=3)])) == [1, 1, 1]


def test_strict_pack_keeps_ranks_together() -> None:
    assert sorted(held(plan([grid(4)], [node(count=2)]))) == [0, 4]


def test_a_strict_pack_that_no_node_holds_is_an_error_with_numbers() -> None:
    result = plan([grid(4, num_cpus=2)], [node(cpus=4, count=2)])
    assert "STRICT_PACK puts 4 ranks on one node" in reasons(result)
    assert "8 CPU" in reasons(result)
    assert "2 x node with 4 CPU" in reasons(result)
    assert held(result) == [0, 0]


def test_the_same_group_fits_where_it_may_spread() -> None:
    result = plan([grid(4, num_cpus=2, placement="PACK")], [node(cpus=4, count=2)])
    assert (held(result), reasons(result)) == ([2, 2], "")


def test_strict_spread_needs_as_many_nodes() -> None:
    three = plan([grid(4, placement="STRICT_SPREAD")], [node(count=3)])
    assert reasons(three)
    four = plan([grid(4, placement="STRICT_SPREAD")], [node(count=4)])
    assert held(four) == [1, 1, 1, 1]


def test_more_than_the_cluster_has_names_what_is_left() -> None:
    result = plan([{"name": "a", "replicas": 5, "num_cpus": 2}], [node(cpus=4, count=2)])
    assert held(result) == [2, 2]
    assert "no room for a[4]" in reasons(result)
    assert "node 1: 0 CPU" in reasons(result)


def test_a_resource_that_no_node_has() -> None:
    result = plan([{"name": "a", "resources": {"decode": 1}}], [node()])
    assert "1 decode" in reasons(result)


def test_resources_choose_the_node() -> None:
    nodes = [NodeType("plain", 1, {"CPU": 8}), NodeType("special", 1, {"CPU": 8, "decode": 1})]
    result = plan([{"name": "a", "resources": {"decode": 1}}], nodes)
    assert [n.name for n in result.nodes if n.ranks] == ["special"]


def test_memory_that_cannot_fit_is_an_error_with_numbers() -> None:
    result = plan([{"name": "a"}], [node(gib=8)], gib=9)
    assert "9.00 GiB" in reasons(result)
    assert "8.00 GiB" in reasons(result)


def test_memory_is_shared_by_all_of_a_node() -> None:
    assert reasons(plan([{"name": "a", "replicas": 2}], [node(gib=8)], gib=5))
    assert not reasons(plan([{"name": "a", "replicas": 2}], [node(gib=8)], gib=4))


def test_nodes_that_ray_may_overfill_are_a_warning() -> None:
    result = plan([{"name": "a", "replicas": 2}], [node(gib=8, count=2)], gib=5)
    assert (held(result), reasons(result)) == ([1, 1], "")
    (warning,) = result.problems
    assert "2 x a may meet on one node" in warning.message
    enough = plan([{"name": "a", "replicas": 2, "num_cpus": 3}], [node(gib=8, count=2)], gib=5)
    assert enough.problems == ()


def test_gpu_memory() -> None:
    gpus = NodeType("gpus", 1, {"CPU": 8, "GPU": 4}, 64 * GIB, 24 * GIB)
    pool = {"name": "a", "num_gpus": 1}
    assert not reasons(plan([pool], [gpus], gib=20))
    assert "the largest GPU has 24.00 GiB" in reasons(plan([pool], [gpus], gib=40))


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_ever_overfilled_and_every_rank_placed_once(seed: int) -> None:
    draw = random.Random(seed)
    pools = [
        {
            "name": f"p{index}",
            "replicas": draw.randint(1, 3),
            "num_cpus": draw.choice([0.5, 1, 2]),
            "placement": draw.choice(["STRICT_PACK", "PACK", "SPREAD", "STRICT_SPREAD"]),
            "engine": {"parallel": {"tensor": draw.choice([1, 2])}},
        }
        for index in range(draw.randint(1, 4))
    ]
    result = plan(pools, [node(count=draw.randint(1, 4))], gib=draw.choice([0.7, 1, 3]))
    seen = set()
    for machine in result.nodes:
        assert machine.used.get("CPU", 0) <= 4
        assert machine.host_bytes <= 8 * GIB
        for rank in machine.ranks:
            name = (rank.group.name, rank.index)
            assert name not in seen
            seen.add(name)
    wanted = sum(g.num_ranks for g in replica_groups(load_config({"pools": pools})))
    assert (len(seen) == wanted) == (not reasons(result))
