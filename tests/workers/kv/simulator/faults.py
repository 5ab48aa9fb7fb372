"""What goes wrong in a schedule. Each returns whether there was something for it to happen to."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from inference_pio.workers.kv.ticket import read_header

from .damage import corrupted, mislabelled
from .messages import Message

if TYPE_CHECKING:
    from inference_pio.workers.kv.handoff import KVImport

    from .world import World


def crash_decode(world: World) -> bool:
    """A decode engine dies and another life of it begins."""
    rng, node = world.rng, world.rng.randrange(len(world.decodes))
    decode = world.decodes[node]
    for incoming in decode.engine.imports._open.values():
        world.coverage[f"crash_decode_{incoming.state.value}"] += 1
    if decode.engine.imports.ends["done"] and decode.engine.sequences:
        world.coverage["crash_decode_imported"] += 1
    # A part of what it had told still reaches the ingress, then the stream breaks.
    for _ in range(rng.randint(0, len(decode.told))):
        decode.told.pop()
    # Whom it left waiting may be told so, or find out at a deadline.
    for name, shipment in world.shipments.items():
        if shipment.node == node and rng.random() < 0.8:
            world.wire.append(Message("cancel", node, name, shipment.epoch))
    world.ingress.sent[node].clear()
    world.ingress.num_disturbances += 1
    world.restart_decode(node)
    return True


def crash_prefill(world: World) -> bool:
    """The prefill engine dies; what it had sent arrives, for its readers own it."""
    for export in world.prefill.exports._open.values():
        world.coverage[f"crash_prefill_{export.state.value}"] += 1
    if any(shipment.end is not None for shipment in world.shipments.values()):
        world.coverage["crash_prefill_computed"] += 1
    if any(message.kind == "ticket" for message in world.wire):
        world.coverage["crash_prefill_tickets_on_their_way"] += 1
    for name, shipment in world.shipments.items():
        end = Message("end", shipment.node, name, shipment.epoch, reason="actor_died")
        world.wire.append(end)
    world.restart_prefill()
    return True


def lose_owner(world: World) -> bool:
    """The prefill engine dies with the tickets that it had sent."""
    world.wire = [m for m in world.wire if m.kind != "ticket" or world.rng.random() < 0.3]
    return crash_prefill(world)


def drop(world: World) -> bool:
    """A message is lost."""
    message = _any_message(world)
    if message is None:
        return False
    world.wire.remove(message)
    world.coverage[f"drop_{message.kind}"] += 1
    return True


def duplicate(world: World) -> bool:
    """A message comes twice."""
    message = _any_message(world)
    if message is None:
        return False
    world.wire.append(message)
    world.coverage[f"duplicate_{message.kind}"] += 1
    return True


def corrupt(world: World) -> bool:
    """A ticket's bytes change."""
    message = _any_ticket(world)
    if message is None or message.damaged:
        return False
    assert message.buffer is not None
    message.buffer = corrupted(message.buffer, world.rng)
    message.damaged = True
    return True


def mislabel(world: World) -> bool:
    """A well-formed ticket, of any age, claims to be what an import waits for."""
    found = _redirected(world)
    if found is None:
        return False
    message, target = found
    assert message.buffer is not None
    message.buffer = mislabelled(message.buffer, target, world.rng)
    message.made_for = None
    return True


def misroute(world: World) -> bool:
    """A sound ticket, of any age, comes under the name of an import."""
    return _redirected(world) is not None


def echo(world: World) -> bool:
    """What an import waits for comes, but from an earlier asking of the same request."""
    places = [
        (message, node, target)
        for node, decode in enumerate(world.decodes)
        for target in decode.engine.imports._open.values()
        for message in world.shipped
        if message.name[0] == target.request_id
        and message.made_for != (target.epoch, (target.request_id, target.attempt))
        and not message.damaged
        and message.buffer is not None
        and read_header(message.buffer).start == target.next
    ]
    if not places:
        return False
    message, node, target = world.rng.choice(places)
    name = (target.request_id, target.attempt)
    world.wire.append(replace(message, node=node, name=name))
    return True


def store_full(world: World) -> bool:
    """The next ticket finds no place in the store."""
    world.store_fails_next = True
    return True


def device_error(world: World) -> bool:
    """An engine's next reading or writing of blocks fails."""
    world.rng.choice(world.engines()).executor.fail_next = True
    return True


def client_leaves(world: World) -> bool:
    """A client closes its connection."""
    waiting = world.ingress.waiting()
    if waiting:
        world.ingress.finish(world.rng.choice(waiting), "left")
    return bool(waiting)


def suspect(world: World) -> bool:
    """The ingress takes a living engine for dead: it asks anew, and late chunks come."""
    waiting = world.ingress.waiting()
    if waiting:
        world.ingress.num_disturbances += 1
        node = world.rng.randrange(len(world.decodes))
        world.ingress.migrate(world.rng.choice(waiting), world.now, node)
    return bool(waiting)


def lose_chunk(world: World) -> bool:
    """An item of a stream is lost."""
    return _disturb(world, lambda told, i: told.__delitem__(i))


def repeat_chunk(world: World) -> bool:
    """An item of a stream comes twice."""
    return _disturb(world, lambda told, i: told.insert(i, told[i]))


def time_passes(world: World) -> bool:
    """Everything stands still for a while."""
    world.now += world.rng.choice((10, 30, 100))
    return True


FAULTS: tuple[Callable[[World], bool], ...] = (
    crash_decode,
    crash_prefill,
    lose_owner,
    drop,
    duplicate,
    corrupt,
    mislabel,
    misroute,
    echo,
    store_full,
    device_error,
    client_leaves,
    suspect,
    lose_chunk,
    repeat_chunk,
    time_passes,
)


REPEATS = ((suspect, echo), (crash_decode, echo))
"""A request is asked for again and the answers to both askings meet: rare where chance decides."""


def _any_message(world: World) -> Message | None:
    return world.rng.choice(world.wire) if world.wire else None


def _any_ticket(world: World) -> Message | None:
    tickets = [message for message in world.wire if message.kind == "ticket"]
    return world.rng.choice(tickets) if tickets else None


def _redirected(world: World) -> tuple[Message, KVImport] | None:
    """A copy of a sound ticket that was sent at some time, on its way to some open import."""
    targets = [
        (node, incoming)
        for node, decode in enumerate(world.decodes)
        for incoming in decode.engine.imports._open.values()
    ]
    tickets = [message for message in world.shipped if not message.damaged]
    if not targets or not tickets:
        return None
    node, target = world.rng.choice(targets)
    message = replace(world.rng.choice(tickets))
    message.node, message.name = node, (target.request_id, target.attempt)
    world.wire.append(message)
    return message, target


def _disturb(world: World, disturb: Callable[[deque, int], None]) -> bool:
    places = [
        (decode.told, i)
        for decode in world.decodes
        for i, item in enumerate(decode.told)
        # A loss shows in the number of what comes next; behind an end nothing does.
        if item is not None and not item.ended
    ]
    if places:
        world.ingress.num_disturbances += 1
        disturb(*world.rng.choice(places))
    return bool(places)
