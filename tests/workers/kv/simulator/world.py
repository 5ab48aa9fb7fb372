"""A whole cluster in one thread under a virtual clock, driven by one integer.

Two decode engines own requests, one prefill engine computes KV for them, an ingress hands requests
to decode engines and collects numbered chunks. Everything between them waits until the schedule
delivers it. A schedule is a random walk from its seed:
1. requests and a number of faults are drawn;
2. each turn does one thing: an engine steps, something arrives, or a fault happens (``faults``);
3. when the turns are used up there are no more faults, and everything goes on until all is quiet:
   every message delivered, every deadline passed;
4. then nothing may be left. Tokens, books and cached KV are checked all the way.

Between decode and prefill messages may overtake each other. A stream between the ingress and a
decode engine keeps its order, as Ray's do, but may lose or repeat items.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from random import Random
from types import SimpleNamespace

from inference_pio.workers import export_desk
from inference_pio.workers.config import EngineConfig
from inference_pio.workers.types import RemoteQuery

from .engine import Chunk, SimulatedEngine
from .faults import FAULTS, REPEATS
from .ingress import Abort, Ingress, Violation
from .messages import Message, Name, Shipment
from .values import BLOCK

NUM_DECODE = 2
WINDOW = 2
"""Tickets of one handoff that may be unacknowledged."""
QUIET_TURNS = 3000
"""Turns without faults after which a schedule counts as hung; a hundred are common."""

DECODE_CONFIG = EngineConfig(
    block_size=BLOCK, max_num_seqs=3, max_batched_tokens=4, default_reservation=1
)
PREFILL_CONFIG = EngineConfig(block_size=BLOCK, max_num_seqs=2, max_batched_tokens=3, max_waiting=2)


class FailedSchedule(AssertionError):
    """A schedule that shows a fault; its seed replays it."""

    def __init__(self, seed: int, error: Exception) -> None:
        super().__init__(f"schedule {seed}: {type(error).__name__}: {error}")
        self.seed = seed


class Decode:
    """One life of one decode engine, and what is on its way from it."""

    def __init__(self, engine: SimulatedEngine) -> None:
        self.engine = engine
        self.pulls: dict[Name, float] = {}
        """Handoffs that are waited for, with their deadlines."""
        self.told: deque[Chunk | None] = deque()
        """The stream to the ingress; ``None``: it is broken."""


class World:
    """One schedule."""

    def __init__(self, seed: int, *, fenced: bool = True, numbered: bool = True) -> None:
        """``fenced`` and ``numbered``: see ``Ingress``."""
        self.rng = rng = Random(seed)
        self.now = 0.0
        self.coverage: Counter[str] = Counter()
        """How often things happened."""
        self._remote_share = rng.choice((1.0, 1.0, 0.5))
        self._disorder = rng.choice((0.0, 0.1, 0.5, 1.0))
        """How often a message overtakes those before it."""
        self._import_deadline = rng.choice((15.0, 40.0, 80.0))
        self.decodes = [Decode(self._decode_engine()) for _ in range(NUM_DECODE)]
        self.prefill = self._prefill_engine()
        self.shipments: dict[Name, Shipment] = {}
        self.wire: list[Message] = []
        """Between decode and prefill engines, in the order they were sent."""
        self.shipped: list[Message] = []
        """Every ticket that was ever sent."""
        self.store_fails_next = False
        self.ingress = Ingress(rng, NUM_DECODE, self.coverage, fenced=fenced, numbered=numbered)
        self._num_faults = rng.choice((0, 1, 1, 2, 2, 3, 4, 6))
        self._fault_rate = rng.choice((0.1, 0.2, 0.5))
        self._favourites = rng.choice((rng.choices(FAULTS, k=2), rng.choice(REPEATS)))

    # --- the schedule ----------------------------------------------------------------------------

    def run(self) -> None:
        """Play the schedule to its quiet end. Raises ``Violation`` or what the engines raise."""
        for _ in range(self.rng.randint(15, 60)):
            if self._num_faults and self.rng.random() < self._fault_rate:
                some = self._favourites if self.rng.random() < 0.6 else FAULTS
                fault = self.rng.choice(some)
                if fault(self):
                    self._num_faults -= 1
                    self.coverage[fault.__name__] += 1
            self._turn()
        for _ in range(QUIET_TURNS):
            if not self._turn() and not self._skip_to_next_deadline():
                break
        else:
            raise Violation(f"not quiet after {QUIET_TURNS} turns: {self._left()}")
        self._check_quiet()

    def _turn(self) -> bool:
        """Do one thing, drawn from all that can be done; whether there was any."""
        self.now += 1
        busy = [node for node, decode in enumerate(self.decodes) if decode.engine.has_work]
        to_decode = [node for node, sent in enumerate(self.ingress.sent) if sent]
        to_ingress = [node for node, decode in enumerate(self.decodes) if decode.told]
        counts = (
            len(busy),
            int(self.prefill.has_work),
            len(self.wire),
            len(to_decode),
            len(to_ingress),
            len(self.ingress.to_come),
        )
        if not any(counts):
            return False
        pick, kind = self.rng.randrange(sum(counts)), 0
        while pick >= counts[kind]:
            pick -= counts[kind]
            kind += 1
        if kind == 0:
            self._step_decode(busy[pick])
        elif kind == 1:
            self._step_prefill()
        elif kind == 2:
            overtakes = self.rng.random() < self._disorder
            self._deliver(self.wire.pop(pick if overtakes else 0))
        elif kind == 3:
            self._take_from_ingress(to_decode[pick])
        elif kind == 4:
            self._tell_ingress(to_ingress[pick])
        else:
            self.ingress.begin(self.rng.randrange(NUM_DECODE), self.now)
        return True

    def _skip_to_next_deadline(self) -> bool:
        """With nothing left to do, let time pass until something ends; whether something does."""
        deadlines = [shipment.deadline for shipment in self.shipments.values()]
        deadlines += [at for decode in self.decodes for at in decode.pulls.values()]
        deadlines += self.ingress.deadlines()
        nearest = (engine.next_deadline() for engine in self.engines())
        deadlines += [deadline for deadline in nearest if deadline is not None]
        if not deadlines:
            return False
        self.now = max(self.now, min(deadlines)) + 1
        self.ingress.expire(self.now)
        for name in [n for n, s in self.shipments.items() if self.now > s.deadline]:
            self._end_shipment(name, "deadline")
        for node, decode in enumerate(self.decodes):
            for name in [name for name, at in decode.pulls.items() if self.now > at]:
                del decode.pulls[name]
                decode.engine.imports.end(*name, "deadline")
            self._step_decode(node)
        self._step_prefill()
        return True

    # --- engines ---------------------------------------------------------------------------------

    def _decode_engine(self) -> SimulatedEngine:
        rng = self.rng

        def remote(_: RemoteQuery) -> bool:
            return rng.random() < self._remote_share

        return SimulatedEngine(
            DECODE_CONFIG,
            rng.choice((10, 10, 12)),
            epoch=rng.getrandbits(63),
            first_attempt=rng.choice((1, 1, 2)),  # few, so that lives and requests collide
            import_deadline=self._import_deadline,
            remote=remote,
            prefix_caching=rng.random() < 0.8,
        )

    def _prefill_engine(self) -> SimulatedEngine:
        return SimulatedEngine(PREFILL_CONFIG, self.rng.choice((7, 9)))

    def engines(self) -> list[SimulatedEngine]:
        """The lives that are."""
        return [*(decode.engine for decode in self.decodes), self.prefill]

    def restart_decode(self, node: int) -> None:
        """Another life; the stream of the last one ends behind what is on its way."""
        self._note_ends(self.decodes[node])
        told = self.decodes[node].told
        self.decodes[node] = Decode(self._decode_engine())
        self.decodes[node].told = told
        told.append(None)

    def restart_prefill(self) -> None:
        """Another life, which knows of nothing."""
        self.shipments.clear()
        self.prefill = self._prefill_engine()

    def _step_decode(self, node: int) -> None:
        decode = self.decodes[node]
        output, chunks = decode.engine.step(self.now)
        decode.engine.check()
        for request in output.wanted:
            name = (request.request_id, request.attempt)
            decode.pulls[name] = self.now + request.deadline_s
            self.wire.append(Message("ask", node, name, request.epoch, request=request))
        for name in output.unwanted:
            if decode.pulls.pop(name, None) is not None:
                self.wire.append(Message("cancel", node, name, decode.engine.epoch))
        decode.told += chunks

    def _step_prefill(self) -> None:
        output, _ = self.prefill.step(self.now)
        self.prefill.check()
        for ticket in output.tickets:
            shipment = self.shipments.get((ticket.request_id, ticket.attempt))
            if shipment is not None:
                shipment.tickets.append(ticket.buffer)
        for end in output.prefill_ends:
            shipment = self.shipments.get((end.request_id, end.attempt))
            if shipment is not None:
                shipment.end = end
        for name in list(self.shipments):
            self._ship(name)

    # --- between decode and prefill --------------------------------------------------------------

    def _ship(self, name: Name) -> None:
        """Send what the window lets through."""
        shipment = self.shipments[name]
        while shipment.tickets and shipment.num_unread < WINDOW:
            buffer = shipment.tickets.popleft()
            if self.store_fails_next:
                self.store_fails_next = False
                self.coverage["ticket_without_place"] += 1
                self._end_shipment(name, "store_full")
                return
            shipment.num_unread += 1
            message = Message("ticket", shipment.node, name, shipment.epoch, buffer=buffer)
            message.made_for = (shipment.epoch, name)
            self.wire.append(message)
            self.shipped.append(message)
        if shipment.end is not None and not shipment.tickets:
            error = shipment.end.error
            self._end_shipment(name, None if error is None else error.code)

    def _end_shipment(self, name: Name, reason: str | None) -> None:
        shipment = self.shipments.pop(name)
        self.prefill.exports.abort(*name)
        self.wire.append(Message("end", shipment.node, name, shipment.epoch, reason=reason))

    def _deliver(self, message: Message) -> None:
        if message.kind == "ask":
            self._take_ask(message)
        elif message.kind == "ticket":
            self._take_ticket(message)
        elif message.kind == "end":
            decode = self.decodes[message.node]
            if message.epoch == decode.engine.epoch and message.name in decode.pulls:
                del decode.pulls[message.name]
                decode.engine.imports.end(*message.name, message.reason)
        else:
            self._take_answer(message)

    def _take_ask(self, message: Message) -> None:
        name, request = message.name, message.request
        assert request is not None
        if name in self.shipments:
            self.coverage["name_in_use"] += 1
            self.wire.append(Message("end", message.node, name, message.epoch, reason="duplicate"))
            return
        deadline = self.now + request.deadline_s
        self.shipments[name] = Shipment(message.node, message.epoch, deadline)
        self.prefill.exports.add(request)

    def _take_answer(self, message: Message) -> None:
        """An acknowledgement, or the reader's leaving."""
        shipment = self.shipments.get(message.name)
        if shipment is None or shipment.epoch != message.epoch:
            return
        if message.kind == "ack":
            shipment.num_unread = max(0, shipment.num_unread - 1)
            self._ship(message.name)
        else:
            del self.shipments[message.name]
            self.prefill.exports.abort(*message.name)

    def _take_ticket(self, message: Message) -> None:
        decode, name = self.decodes[message.node], message.name
        desk = decode.engine.imports
        assert message.buffer is not None
        before = desk.num_tokens_received
        desk.offer(*name, message.buffer, self.now)
        decode.engine.check()
        if desk.num_tokens_received > before:
            self.coverage["accepted"] += 1
            if message.damaged:
                raise Violation(f"{name} took a damaged ticket")
            if message.made_for not in (None, (decode.engine.epoch, name)):
                raise Violation(f"{name} took a ticket that was made for {message.made_for}")
        if name in decode.pulls:
            self.wire.append(Message("ack", message.node, name, message.epoch))

    # --- between decode engines and the ingress --------------------------------------------------

    def _take_from_ingress(self, node: int) -> None:
        engine, item = self.decodes[node].engine, self.ingress.sent[node].popleft()
        if isinstance(item, Abort):
            engine.abort(item.request_id)
            return
        request, stay = item
        if engine.scheduler.holds(request.request_id):
            raise Violation(f"{request.request_id} comes to an engine that still has it")
        engine.add(request, stay, self.now)

    def _tell_ingress(self, node: int) -> None:
        chunk = self.decodes[node].told.popleft()
        if chunk is None:
            self.ingress.lose(node, self.now)
        else:
            self.ingress.receive(chunk.stay, chunk, self.now)

    # --- the end ---------------------------------------------------------------------------------

    def _note_ends(self, decode: Decode) -> None:
        for reason, times in decode.engine.imports.ends.items():
            self.coverage[f"import_{reason}"] += times
        for reason, times in decode.engine.imports.ignored.items():
            self.coverage[f"ignored_{reason}"] += times

    def _left(self) -> str:
        return (
            f"requests {[c.request.request_id for c in self.ingress.waiting()]}, "
            f"messages {[m.kind for m in self.wire]}, shipments {list(self.shipments)}, "
            f"imports {[len(d.engine.imports) for d in self.decodes]}, "
            f"exports {len(self.prefill.exports)}"
        )

    def _check_quiet(self) -> None:
        """Every request has ended, and nothing is held any more."""
        self.ingress.check_quiet()
        for engine in self.engines():
            engine.check()
            if engine.kv.num_used_blocks or not engine.scheduler.is_empty:
                raise Violation(f"{engine.kv.num_used_blocks} blocks are held at quiet")
            if len(engine.imports) or len(engine.exports):
                raise Violation(f"handoffs are open at quiet: {self._left()}")
        if self.wire or self.shipments or any(decode.pulls for decode in self.decodes):
            raise Violation(f"left over at quiet: {self._left()}")
        for decode in self.decodes:
            self._note_ends(decode)


@contextmanager
def _virtual_time() -> Iterator[SimpleNamespace]:
    """Let the export desk read the clock of ``world``; what is expected to go wrong is not logged.

    Patched and not passed: in an engine the desk reads the clock itself.
    """
    clock = SimpleNamespace(world=None, monotonic=lambda: clock.world.now)
    real, export_desk.time = export_desk.time, clock
    logging.disable(logging.CRITICAL)
    try:
        yield clock
    finally:
        export_desk.time = real
        logging.disable(logging.NOTSET)


def run_schedules(seeds: Iterable[int], **settings: bool) -> Counter[str]:
    """Play schedules; what happened how often, ``schedules`` among it.

    ``settings`` go to ``World``. Raises ``FailedSchedule`` at the first seed that shows a fault.
    """
    total: Counter[str] = Counter()
    with _virtual_time() as clock:
        for seed in seeds:
            clock.world = world = World(seed, **settings)
            try:
                world.run()
            except Exception as error:
                raise FailedSchedule(seed, error) from error
            total.update(world.coverage)
            total["schedules"] += 1
    return total
