"""Which layers stay: the limit is kept, nothing is wasted, and they are spread."""

from __future__ import annotations

import itertools
import random

import pytest

from inference_pio.workers.model.streaming.residency import NUM_SLOTS, plan_residency


def taken(resident: tuple[bool, ...], layer_bytes: int, fixed_bytes: int) -> int:
    slots = 0 if all(resident) else NUM_SLOTS
    return fixed_bytes + (sum(resident) + slots) * layer_bytes


@pytest.mark.parametrize("seed", range(200))
def test_as_many_layers_stay_as_the_limit_holds(seed: int) -> None:
    rng = random.Random(seed)
    count, layer, fixed = rng.randint(1, 40), rng.randint(1, 50), rng.randint(0, 200)
    limit = fixed + rng.randint(min(NUM_SLOTS, count) * layer, (count + 2) * layer)
    resident = plan_residency(num_layers=count, layer_bytes=layer, fixed_bytes=fixed, limit=limit)
    assert len(resident) == count
    assert taken(resident, layer, fixed) <= limit
    if not all(resident):
        assert limit < fixed + count * layer, "everything fits, but something is streamed"
        assert limit < taken(resident, layer, fixed) + layer, "one more layer would fit"
        assert resident.count(False) >= NUM_SLOTS


@pytest.mark.parametrize(("count", "kept"), [(36, 8), (36, 18), (28, 25), (7, 3), (5, 1), (9, 0)])
def test_streamed_layers_are_as_far_apart_as_can_be(count: int, kept: int) -> None:
    """Around the circle: behind the last layer of a step comes the first one of the next."""
    limit = (kept + NUM_SLOTS) * 10
    resident = plan_residency(num_layers=count, layer_bytes=10, fixed_bytes=0, limit=limit)
    assert sum(resident) == kept
    rarer = kept * 2 > count  # what there is less of must never stand closer than needed
    places = [i for i, stays in enumerate(resident) if stays != rarer]
    gaps = {b - a for a, b in itertools.pairwise([*places, places[0] + count])} if places else {0}
    assert max(gaps) - min(gaps) <= 1


def test_a_limit_that_is_too_low_is_told_what_would_do() -> None:
    wanted = {"num_layers": 28, "layer_bytes": 30, "fixed_bytes": 100}
    with pytest.raises(ValueError, match="weight_memory_bytes is 159; at least 160 are needed"):
        plan_residency(**wanted, limit=159)
    assert plan_residency(**wanted, limit=160) == (False,) * 28
    with pytest.raises(ValueError, match="at least 130 are needed"):
        plan_residency(**wanted | {"num_layers": 1}, limit=129)
    assert plan_residency(**wanted | {"num_layers": 1}, limit=130) == (True,)
