from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inference_pio.kernels.sampling.edits import apply_edit, resolved
from inference_pio.workers.sampling.edits import UnreadRows, edits_of
from inference_pio.workers.sampling.penalties import PenaltyState
from inference_pio.workers.sampling.resolve import EffectiveSampling, RepetitionWindow
from inference_pio.workers.sampling.row import SamplingRow, TokenBias
from inference_pio.workers.types import TokenKind

VOCAB = 24
token_ids = st.integers(0, VOCAB - 1)
tokens = st.tuples(token_ids, st.sampled_from([TokenKind.THOUGHT, TokenKind.CONTENT]))
biases = st.dictionaries(token_ids, st.floats(-100, 100), max_size=4)

cases = st.fixed_dictionaries(
    {
        "prompt": st.lists(token_ids, max_size=10),
        "output": st.lists(tokens, max_size=30),
        "repetition": st.sampled_from([0.5, 1.0, 1.5]),
        "window": st.sampled_from(RepetitionWindow),
        "presence": st.sampled_from([-2.0, 0.0, 0.3]),
        "frequency": st.sampled_from([-0.7, 0.0, 2.0]),
        "bias": st.none() | biases,
        "banned": st.lists(token_ids, max_size=4),
        "allowed": st.none() | st.sets(token_ids, min_size=1),
    }
)


def row_of(case: dict[str, Any]) -> SamplingRow:
    penalties = PenaltyState(case["prompt"])
    for token_id, kind in case["output"]:
        penalties.append(token_id, kind)
    bias, allowed = case["bias"], case["allowed"]
    return SamplingRow(
        EffectiveSampling(
            presence_penalty=case["presence"],
            frequency_penalty=case["frequency"],
            repetition_penalty=case["repetition"],
            repetition_window=case["window"],
        ),
        seed=0,
        step=0,
        penalties=penalties,
        banned=tuple(case["banned"]),
        bias=None
        if bias is None
        else TokenBias(
            np.array(list(bias), dtype=np.int64), np.array(list(bias.values()), dtype=np.float32)
        ),
        allowed=None if allowed is None else np.array(sorted(allowed), dtype=np.int64),
    )


def edited(logits: list[float], case: dict[str, Any]) -> list[float]:
    """The definition, one token at a time in float64."""
    counts = Counter(token_id for token_id, _ in case["output"])
    penalised = {
        RepetitionWindow.SEQUENCE: {*case["prompt"], *counts},
        RepetitionWindow.THOUGHT: {t for t, kind in case["output"] if kind is TokenKind.THOUGHT},
        RepetitionWindow.ANSWER: {t for t, kind in case["output"] if kind is TokenKind.CONTENT},
    }[case["window"]]
    result = []
    for token_id, logit in enumerate(logits):
        if token_id in penalised:
            logit = logit / case["repetition"] if logit > 0 else logit * case["repetition"]
        if counts[token_id]:
            logit -= case["presence"] + case["frequency"] * counts[token_id]
        logit += (case["bias"] or {}).get(token_id, 0.0)
        allowed = case["allowed"] is None or token_id in case["allowed"]
        result.append(logit if allowed and token_id not in case["banned"] else -np.inf)
    return result


@settings(deadline=None)
@given(st.lists(cases, min_size=1, max_size=5), st.integers(0, 2**32 - 1))
def test_rows_are_edited_as_one_token_at_a_time(cases: list[dict[str, Any]], seed: int) -> None:
    torch.manual_seed(seed)
    logits_RV = torch.randn(len(cases), VOCAB + 3) * 5
    logits_RV[:, VOCAB:] = 7.0
    before = logits_RV.tolist()
    for edit in edits_of([row_of(case) for case in cases]):
        apply_edit(logits_RV, edit)
    for row, case in enumerate(cases):
        np.testing.assert_allclose(
            logits_RV[row, :VOCAB].tolist(), edited(before[row][:VOCAB], case), rtol=1e-5, atol=1e-5
        )


@given(
    rows=st.lists(st.tuples(cases, st.none() | tokens), min_size=1, max_size=4),
    logits=st.data(),
)
def test_an_unread_token_is_counted_like_one_that_was_read(
    rows: list[tuple[dict[str, Any], tuple[int, TokenKind] | None]], logits: st.DataObject
) -> None:
    values = st.lists(st.floats(-50, 50, width=32), min_size=VOCAB, max_size=VOCAB)
    logits_RV = torch.tensor([logits.draw(values) for _ in rows])
    tokens_N, places, counted = [-1], [], []
    for case, token in rows:
        places.append(-1 if token is None else len(tokens_N))
        output = case["output"] + ([] if token is None else [token])
        if token is not None:
            kind_counts = PenaltyState.counts_in(case["window"], token[1])
            case = case if kind_counts else case | {"repetition": 1.0}
            tokens_N.append(token[0])
        counted.append((row_of(case), row_of(case | {"output": output})))
    unread = UnreadRows(torch.tensor(tokens_N), places)
    ours, resolved_too, expected = logits_RV.clone(), logits_RV.clone(), logits_RV.clone()
    for edit in edits_of([before for before, _ in counted], unread):
        apply_edit(ours, edit)
        apply_edit(resolved_too, resolved(edit))
    for edit in edits_of([after for _, after in counted]):
        apply_edit(expected, edit)
    assert torch.equal(ours, expected)
    assert torch.equal(resolved_too, expected)


def test_an_unread_fault_is_counted_nowhere() -> None:
    case = {"prompt": [1], "output": [(2, TokenKind.CONTENT)], "repetition": 1.5}
    case |= {"window": RepetitionWindow.SEQUENCE, "presence": 0.3, "frequency": 2.0}
    row = row_of(case | {"bias": None, "banned": [], "allowed": None})
    unread = UnreadRows(torch.tensor([-1]), [0])
    ours, expected = torch.linspace(-2, 2, VOCAB)[None], torch.linspace(-2, 2, VOCAB)[None].clone()
    for edit in edits_of([row], unread):
        assert edit.unread is not None
        apply_edit(ours, edit)
    for edit in edits_of([row]):
        apply_edit(expected, edit)
    assert torch.equal(ours, expected)
