"""Commands as words: what goes in comes out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_pio.kernels.context import ContextItem
from inference_pio.workers.parallel.command import (
    HEAD_WORDS,
    Kind,
    StepInputs,
    command,
    decode_step,
    encode_step,
)

words = st.lists(st.integers(0, 2**31), max_size=20)
items = st.builds(
    ContextItem, block_table=words, num_computed=st.integers(0), num_new=st.integers(1)
)
steps = st.builds(StepInputs, words, st.lists(items, max_size=6), words)


@given(steps)
def test_a_step_survives(step: StepInputs) -> None:
    message = command(Kind.STEP, encode_step(step))
    assert message[0] == len(message)
    assert message[1] == Kind.STEP
    assert decode_step(message[HEAD_WORDS:]) == step


@given(steps, st.data())
def test_a_cut_or_longer_step_is_refused(step: StepInputs, data: st.DataObject) -> None:
    payload = encode_step(step)
    with pytest.raises(ValueError, match="words early"):
        decode_step(payload[: data.draw(st.integers(0, len(payload) - 1))])
    with pytest.raises(ValueError, match="more than its"):
        decode_step([*payload, 7])
