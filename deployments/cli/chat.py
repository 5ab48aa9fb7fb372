"""``inference-pio chat``: a conversation in the terminal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from .console import CommandError, err, out
from .show import show_reply
from .talk import Manner, Message, Talker

HELP = (
    "Type a message. /think and /no_think, alone, switch thinking for what follows; inside a "
    "message they go to the model.\n"
    "/budget N ends thoughts after N tokens, /budget off never. /new starts again, "
    "/quit or Ctrl-D leaves."
)


@dataclass(frozen=True, slots=True)
class Order:
    """What a line that begins with a slash changed."""

    manner: Manner
    said: str


def read_order(line: str, manner: Manner) -> Order | None:
    """The order in ``line``, or ``None`` for a message.

    Raises ``CommandError`` for an order that does not exist or has a wrong value.
    """
    if not line.startswith("/"):
        return None
    name, _, value = line.partition(" ")
    if name in ("/think", "/no_think", "/nothink"):
        if value:
            return None  # a soft switch in front of a message: the model reads it
        on = name == "/think"
        return Order(replace(manner, thinking=on), f"thinking is {'on' if on else 'off'}")
    if name == "/budget":
        return _read_budget(value.strip(), manner)
    raise CommandError(f"there is no {name}; /help lists what there is")


def _read_budget(value: str, manner: Manner) -> Order:
    if value == "off":
        return Order(replace(manner, budget=None), "thoughts have no budget")
    if not value.isdecimal():
        raise CommandError("/budget takes a number of tokens, or off")
    return Order(replace(manner, budget=int(value)), f"thoughts end after {int(value)} tokens")


def run_chat(talker: Talker, manner: Manner, ask: Callable[[str], str] = input) -> None:
    """Read messages and show replies until the input ends.

    ``ask`` shows a prompt and returns a line; it raises ``EOFError`` at the end.
    """
    out.print(f"[bold green]{talker.name}[/]  [dim]/help, /quit[/]")
    messages: list[Message] = []
    while True:
        try:
            line = ask("> ").strip()
        except (EOFError, KeyboardInterrupt):
            out.print()
            return
        if line == "/quit":
            return
        if line == "/help":
            out.print(HELP, markup=False)
        elif line == "/new":
            messages = []
            out.print("[dim]a new conversation[/]")
        elif line:
            manner = _take(line, talker, messages, manner)


def _take(line: str, talker: Talker, messages: list[Message], manner: Manner) -> Manner:
    """Follow an order, or answer a message and add both turns; returns the manner from here on."""
    try:
        order = read_order(line, manner)
        if order is not None:
            out.print(f"[dim]{order.said}[/]")
            return order.manner
        turn: Message = {"role": "user", "content": line}
        reply = show_reply(talker.reply([*messages, turn], manner), out)
        # The thought stays out: the template drops those of earlier turns anyway.
        messages += [turn, {"role": "assistant", "content": reply.content}]
    except KeyboardInterrupt:
        out.print("\n[dim]interrupted; the message is dropped[/]")
    except (CommandError, ValueError) as error:
        err.print(f"[bold red]error:[/] {error}")
    return manner
