from __future__ import annotations

import io
from collections.abc import Callable, Iterator

import pytest
from rich.console import Console

from inference_pio.deployments.cli import chat
from inference_pio.deployments.cli.chat import read_order, run_chat
from inference_pio.deployments.cli.console import CommandError
from inference_pio.deployments.cli.show import show_reply
from inference_pio.deployments.cli.talk import Manner, Piece
from inference_pio.deployments.cli.talk_local import LocalTalker

GREEDY = Manner(temperature=0.0)


@pytest.fixture(scope="module")
def talker() -> Iterator[LocalTalker]:
    with LocalTalker("embedded", {}) as talker:
        yield talker


@pytest.mark.parametrize(
    ("line", "manner"),
    [
        ("/think", Manner(thinking=True)),
        ("/no_think", Manner(thinking=False)),
        ("/nothink", Manner(thinking=False)),
        ("/budget 40", Manner(budget=40)),
        ("/budget off", Manner()),
    ],
)
def test_orders_change_the_manner(line: str, manner: Manner) -> None:
    order = read_order(line, Manner())
    assert order is not None
    assert order.manner == manner


@pytest.mark.parametrize("line", ["hello", "a /think b", "/no_think what is 3 + 4?"])
def test_everything_else_is_for_the_model(line: str) -> None:
    assert read_order(line, Manner()) is None


@pytest.mark.parametrize("line", ["/budget", "/budget -1", "/budget x", "/thnk"])
def test_a_wrong_order_is_refused(line: str) -> None:
    with pytest.raises(CommandError):
        read_order(line, Manner())


def test_pieces_of_a_local_reply_join_to_the_whole(talker: LocalTalker) -> None:
    question = {"role": "user", "content": "What is 12 + 34 - 5?"}
    pieces = list(talker.reply([question], Manner(thinking=True, temperature=0.0)))
    assert len(pieces) > 10
    assert "".join(piece.content for piece in pieces) == "41"
    assert "+0041" in "".join(piece.reasoning for piece in pieces)
    assert not any(p.reasoning for p in talker.reply([question], Manner(thinking=False)))


def test_a_reply_that_is_left_early_is_aborted(talker: LocalTalker) -> None:
    question = {"role": "user", "content": "What is 12 + 34 - 5?"}
    for _ in range(3):
        reply = talker.reply([question], GREEDY)
        assert next(reply) is not None
        reply.close()
    assert list(talker.reply([question], GREEDY))


def test_the_thought_is_shown_apart() -> None:
    screen = Console(file=io.StringIO(), width=80)
    pieces = [Piece("one\ntw"), Piece("o"), Piece(content="[bold]4"), Piece(content="2")]
    reply = show_reply(iter(pieces), screen)
    assert (reply.reasoning, reply.content) == ("one\ntwo", "[bold]42")
    file = screen.file
    assert isinstance(file, io.StringIO)
    assert file.getvalue() == "┆ one\n┆ two\n[bold]42\n"


def typing(*lines: str) -> Callable[[str], str]:
    left = iter(lines)

    def ask(_prompt: str) -> str:
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    return ask


def test_a_session_keeps_its_turns_until_new(
    talker: LocalTalker, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Console(file=io.StringIO(), width=200)
    monkeypatch.setattr(chat, "out", screen)
    monkeypatch.setattr(chat, "err", screen)
    lines = ("/think", "What is 12 + 34 - 5?", "Now add 10 to that.", "/oops", "/new", "/quit", "x")
    run_chat(talker, GREEDY, typing(*lines))
    file = screen.file
    assert isinstance(file, io.StringIO)
    shown = file.getvalue()
    assert "\n41\n" in shown
    assert "\n51\n" in shown
    assert "error: there is no /oops" in shown
    assert shown.rstrip().endswith("a new conversation")
