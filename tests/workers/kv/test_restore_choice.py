"""How much of a prompt is restored, against every place to stop."""

from __future__ import annotations

from math import inf

from hypothesis import given
from hypothesis import strategies as st

from inference_pio.workers.kv.restore_choice import num_worth_restoring
from inference_pio.workers.kv.tier import TierName

TIERS: st.SearchStrategy[list[TierName]] = st.lists(st.sampled_from(["host", "disk"]), max_size=12)
SECONDS = st.none() | st.sampled_from([0.5, 1.0, 2.0, inf])


@given(tiers=TIERS, host=SECONDS, disk=SECONDS, compute=st.sampled_from([0.25, 1.0, 4.0]))
def test_no_other_place_to_stop_is_faster(
    tiers: list[TierName], host: float | None, disk: float | None, compute: float
) -> None:
    cost = {"host": host or 0.0, "disk": disk or 0.0}

    def seconds(count: int) -> float:
        return sum(cost[tier] for tier in tiers[:count]) + compute * (len(tiers) - count)

    count = num_worth_restoring(tiers, {"host": host, "disk": disk}, compute)
    every = [seconds(number) for number in range(len(tiers) + 1)]
    assert every[count] == min(every)
    assert count == every.index(min(every))


def test_without_a_rate_of_computing_all_is_tried_that_answers() -> None:
    assert num_worth_restoring(["host", "disk"], {"host": None, "disk": 3.0}, None) == 2
    assert num_worth_restoring(["host", "disk"], {"host": None, "disk": inf}, None) == 1
