"""The handoff protocol under random schedules of faults: see ``simulator/world.py``.

A failing schedule is replayed by its number: ``run_schedules([number])``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from .simulator.faults import FAULTS
from .simulator.planted import BUGS, planted
from .simulator.world import FailedSchedule, run_schedules

REPOSITORY = Path(__file__).resolve().parents[3]
NUM_DEFAULT = 4_000
"""The rarest of what is to be seen comes up eight times in them."""
NUM_SLOW = 1_000_000
NUM_PROCESSES = 2
FOUND_WITHIN = 4_000
"""Schedules in which each planted bug shows; most do within ten."""

SEEN = (
    # an engine dies before, between and after the chunks
    "crash_decode_requested",
    "crash_decode_importing",
    "crash_decode_imported",
    "crash_prefill_queued",
    "crash_prefill_exporting",
    "crash_prefill_computed",
    "crash_prefill_tickets_on_their_way",
    # what is lost or comes twice
    *(f"{what}_{kind}" for what in ("drop", "duplicate") for kind in ("ask", "cancel", "ack")),
    *(f"{what}_{kind}" for what in ("drop", "duplicate") for kind in ("ticket", "end")),
    "ticket_without_place",
    "name_in_use",
    "late_chunk",
    "stream_broken",
    "migrated",
    # how imports end
    "import_done",
    "import_incomplete",
    "import_deadline",
    "import_preempted",
    "import_request_ended",
    "import_actor_died",
    "import_store_full",
    "import_queue_full",
    "import_internal_error",
    "import_write_failed",
    "import_wrong_span",
    "import_wrong_chain",
    "import_bad_header_checksum",
    "import_bad_payload_checksum",
    "import_truncated",
    # tickets that are passed over
    "ignored_unknown",
    "ignored_duplicate",
    "ignored_wrong_request",
    "ignored_stale_attempt",
    "ignored_stale_epoch",
    # how requests end
    "outcome_done",
    "outcome_left",
    "outcome_deadline",
    "outcome_migrations_exhausted",
)


def check_coverage(seen: Counter[str]) -> None:
    missing = [name for name in (*SEEN, *(f.__name__ for f in FAULTS)) if not seen[name]]
    assert not missing, f"the schedules never come to: {missing}"


def test_schedules_of_faults_give_the_tokens_of_the_unbroken_run() -> None:
    seen = run_schedules(range(NUM_DEFAULT))
    assert seen["schedules"] == NUM_DEFAULT
    check_coverage(seen)
    # A fault is an exception: most of the work goes well, and most of it by handoff.
    assert seen["outcome_done"] > 5 * seen["outcome_left"]
    assert seen["import_done"] > NUM_DEFAULT / 2


@pytest.mark.slow
@pytest.mark.timeout(6 * 3600)
def test_a_million_schedules() -> None:
    share = NUM_SLOW // NUM_PROCESSES
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.workers.kv.simulator", str(i * share), str(share)],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(NUM_PROCESSES)
    ]
    seen: Counter[str] = Counter()
    for run in runs:
        output, _ = run.communicate()
        assert run.returncode == 0, "see the failed schedule above"
        seen.update(json.loads(output))
    assert seen["schedules"] == NUM_SLOW
    check_coverage(seen)


def test_a_schedule_is_its_number() -> None:
    """The same number gives the same run, whatever ran before."""
    alone = [run_schedules([number]) for number in range(40, 60)]
    again = [run_schedules([number]) for number in reversed(range(40, 60))]
    assert alone == again[::-1]
    assert len({json.dumps(run, sort_keys=True) for run in alone}) > 15


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug: str) -> None:
    with planted(bug), pytest.raises(FailedSchedule) as found:
        run_schedules(range(FOUND_WITHIN))
    run_schedules([found.value.seed])  # it is the bug that fails, not the schedule


@pytest.mark.parametrize("check", ["fenced", "numbered"])
def test_an_ingress_that_does_not_check_is_found(check: str) -> None:
    with pytest.raises(FailedSchedule):
        run_schedules(range(FOUND_WITHIN), **{check: False})
