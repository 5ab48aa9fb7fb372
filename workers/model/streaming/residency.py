"""Which layers stay in memory where the memory for weights does not hold them all."""

from __future__ import annotations

NUM_SLOTS = 2
"""Places for streamed layers: one is computed while the next one is read. A third would only help
where reading is uneven, and a layer that stays in memory always saves a read."""


def plan_residency(
    *, num_layers: int, layer_bytes: int, fixed_bytes: int, limit: int
) -> tuple[bool, ...]:
    """For each layer whether it stays; all do where ``limit`` holds everything.

    ``fixed_bytes`` is what always stays: the head and the norms. Layers that stay are spread
    evenly, so that each streamed one is read while as many others as possible are computed. Raises
    ``ValueError`` for a limit that does not even hold the slots.
    """
    if fixed_bytes + num_layers * layer_bytes <= limit:
        return (True,) * num_layers
    least = fixed_bytes + min(NUM_SLOTS, num_layers) * layer_bytes
    if limit < least:
        raise ValueError(
            f"weight_memory_bytes is {limit}; at least {least} are needed: {fixed_bytes} for the "
            f"head and the norms, {layer_bytes} for each of {min(NUM_SLOTS, num_layers)} layers, "
            "one that is computed and one that is read"
        )
    kept = (limit - fixed_bytes) // layer_bytes - NUM_SLOTS
    return tuple(kept * (i + 1) // num_layers > kept * i // num_layers for i in range(num_layers))
