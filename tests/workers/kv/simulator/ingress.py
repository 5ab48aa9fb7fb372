"""The ingress of the simulator: clients, numbered chunks, and requests that move on.

Every chunk is compared with the unbroken run as it arrives.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random

from inference_pio.deployments.migration import Choice, remaining_requests
from inference_pio.workers.types import GenerateRequest, SamplingParams

from .engine import MAX_LEN, Chunk
from .values import unbroken

MAX_MIGRATIONS = 3

_STEMS = ((1, 2, 3, 1, 2, 3, 1, 2, 3), (1, 2, 3, 2, 1, 1, 2, 3, 1), (3, 3, 1, 2, 2, 1, 1, 3, 2))
_PARAMS = {
    (n, most): SamplingParams(n=n, max_tokens=most) for n in (1, 2) for most in (1, 3, 4, None)
}


class Violation(AssertionError):
    """Something that must never happen."""


@dataclass(frozen=True, slots=True)
class Abort:
    """To a decode engine: the request is not wanted any longer."""

    request_id: str


Sent = tuple[GenerateRequest, int] | Abort
"""What the ingress sends: a request with the number of its stay, or an abort."""


@dataclass(eq=False, slots=True)
class Client:
    """One request as the ingress sees it."""

    request: GenerateRequest
    received: dict[Choice, list[int]]
    open: list[Choice]
    deadline: float | None = None
    stay: int = 0
    """Counts the engines that it was handed to."""
    node: int = 0
    outcome: str | None = None


class Ingress:
    """All clients, and a queue of what was sent to each decode engine."""

    def __init__(
        self, rng: Random, num_nodes: int, coverage: Counter[str], *, fenced: bool, numbered: bool
    ) -> None:
        """``fenced`` and ``numbered`` are what it checks; off, it is broken on purpose."""
        self.sent: list[deque[Sent]] = [deque() for _ in range(num_nodes)]
        self.clients = [_new_client(rng, f"r{i}") for i in range(rng.randint(1, 3))]
        self.to_come = list(self.clients)
        self.num_disturbances = 0
        """Faults so far that make requests move on; none moves more often."""
        self._by_name = {client.request.request_id: client for client in self.clients}
        self._coverage = coverage
        self._fenced = fenced
        self._numbered = numbered

    def waiting(self) -> list[Client]:
        """Clients that are being served."""
        return [c for c in self.clients if c.outcome is None and c.stay > 0]

    def deadlines(self) -> Iterator[float]:
        """Of the clients that are being served."""
        return (c.deadline for c in self.waiting() if c.deadline is not None)

    def begin(self, node: int, now: float) -> None:
        """The next client comes and is handed to ``node``."""
        client = self.to_come.pop()
        if client.request.deadline_s is not None:
            client.deadline = now + client.request.deadline_s
        self._hand_over(client, node, now)

    def receive(self, stay: int, chunk: Chunk, now: float) -> None:
        """The next item of a decode engine's stream."""
        client = self._by_name[chunk.request_id]
        if client.outcome is not None or (self._fenced and stay != client.stay):
            self._coverage["late_chunk"] += 1
            return
        choice = (chunk.request_id, chunk.index)
        if chunk.error == "deadline" and client.deadline is not None:
            self.finish(client, "deadline")
        elif chunk.error is not None:
            self.migrate(client, now)
        elif self._numbered and (
            choice not in client.open or chunk.first != len(client.received[choice])
        ):
            self._coverage["stream_broken"] += 1
            self.migrate(client, now)
        else:
            client.received[choice] += chunk.token_ids
            _compare(client, choice, ended=chunk.ended)
            if chunk.ended and choice in client.open:
                client.open.remove(choice)
            if not client.open:
                self.finish(client, "done")

    def lose(self, node: int, now: float) -> None:
        """A decode engine's stream broke: what it served goes on elsewhere."""
        for client in self.waiting():
            if client.node == node:
                self.migrate(client, now)

    def migrate(self, client: Client, now: float, node: int | None = None) -> None:
        """Leave the engine and go on at ``node``, by default the next one."""
        self._coverage["migrated"] += 1
        if client.stay > self.num_disturbances:
            raise Violation(f"{client.request.request_id} moves on for no reason")
        if client.stay > MAX_MIGRATIONS:
            self.finish(client, "migrations_exhausted")
            return
        self.sent[client.node].append(Abort(client.request.request_id))
        node = (client.node + 1) % len(self.sent) if node is None else node
        self._hand_over(client, node, now)

    def expire(self, now: float) -> None:
        """End what is late."""
        for client in self.waiting():
            if client.deadline is not None and now > client.deadline:
                self.finish(client, "deadline")

    def finish(self, client: Client, outcome: str) -> None:
        """The one end of a request."""
        if client.outcome is not None:
            raise Violation(f"{client.request.request_id} ends twice")
        client.outcome = outcome
        self._coverage[f"outcome_{outcome}"] += 1
        if outcome != "done":
            self.sent[client.node].append(Abort(client.request.request_id))

    def _hand_over(self, client: Client, node: int, now: float) -> None:
        """Ask an engine for all that is open of a request."""
        received = {choice: client.received[choice] for choice in client.open}
        left = 0.0 if client.deadline is None else client.deadline - now
        if left < 0:
            self.finish(client, "deadline")
            return
        (request,) = remaining_requests([client.request], received, left)
        if client.deadline is None:
            request = replace(request, deadline_s=None)
        client.stay += 1
        client.node = node
        self.sent[node].append((request, client.stay))

    def check_quiet(self) -> None:
        """Every request ended, with an outcome that it can have."""
        for client in self.clients:
            who = client.request.request_id
            if client.outcome is None:
                raise Violation(f"{who} never ended")
            if client.outcome == "deadline" and client.deadline is None:
                raise Violation(f"{who} missed a deadline that it does not have")


def _new_client(rng: Random, request_id: str) -> Client:
    stem = rng.choice(_STEMS)
    n = rng.choice((1, 1, 1, 2))
    request = GenerateRequest(
        request_id,
        stem[: rng.randint(1, len(stem))],
        _PARAMS[n, rng.choice((1, 3, 4, None))],
        priority=rng.choice((0, 0, 1)),
        cache_salt=rng.choice(("", "", "s")),
        deadline_s=rng.choice((None, None, None, 60.0, 150.0)),
    )
    choices = [(request_id, index) for index in range(n)]
    return Client(request, {choice: [] for choice in choices}, choices)


def _compare(client: Client, choice: Choice, *, ended: bool) -> None:
    request, tokens = client.request, tuple(client.received[choice])
    most = request.params.max_tokens or MAX_LEN - len(request.prompt_token_ids)
    right = unbroken(request.cache_salt, request.prompt_token_ids, choice[1], most)
    if tokens != right[: len(tokens)] or (ended and tokens != right):
        end = " at its end" if ended else ""
        raise Violation(f"{choice} got {tokens}{end}, the unbroken run gives {right}")
