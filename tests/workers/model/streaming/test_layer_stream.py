"""Reading ahead: the right layer at any time, whatever a step did, and a clean end."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from inference_pio.workers.model.streaming.errors import WeightReadError
from inference_pio.workers.model.streaming.layer_stream import LayerStream, aligned_memory
from inference_pio.workers.model.streaming.residency import NUM_SLOTS
from inference_pio.workers.model.streaming.weight_file import BLOCK, WeightFile

SIZE = 4 * BLOCK
MakeStream = Callable[[int], tuple[LayerStream, WeightFile]]


@pytest.fixture
def make_stream(tmp_path: Path) -> Iterator[MakeStream]:
    """Streams of layers that are filled with their number, closed at the end."""
    streams: list[LayerStream] = []

    def make(num_layers: int) -> tuple[LayerStream, WeightFile]:
        file = WeightFile(tmp_path, num_layers=num_layers, layer_bytes=SIZE)
        memory = aligned_memory(SIZE)
        for index in range(num_layers):
            file.write(index, memory.fill_(index + 1).numpy().data)
        streams.append(LayerStream(file, num_layers))
        streams[-1].start()
        return streams[-1], file

    yield make
    for stream in streams:
        stream.close()
    assert not [t for t in threading.enumerate() if t.name == "weights"]


def take(stream: LayerStream, index: int) -> None:
    with stream.layer(index) as memory:
        assert torch.equal(memory, torch.full((SIZE,), index + 1, dtype=torch.uint8))


def wait_for_bytes(stream: LayerStream, num_bytes: int) -> None:
    deadline = time.monotonic() + 30
    while stream.stats().num_bytes < num_bytes:
        assert time.monotonic() < deadline, f"only {stream.stats().num_bytes} bytes were read"
        time.sleep(0.001)


@pytest.mark.parametrize("num_layers", [1, 2, 3, 8])
def test_layers_come_in_their_order_round_after_round(
    num_layers: int, make_stream: MakeStream
) -> None:
    stream, _ = make_stream(num_layers)
    for _ in range(5):
        for index in range(num_layers):
            take(stream, index)
            stream.check_integrity()
    assert stream.stats().num_bytes >= 5 * num_layers * SIZE


@pytest.mark.parametrize("seed", range(5))
def test_steps_that_are_given_up_do_not_mix_layers_up(seed: int, make_stream: MakeStream) -> None:
    rng = random.Random(seed)
    stream, _ = make_stream(rng.randint(1, 7))
    for _ in range(20):
        for index in range(rng.randint(0, stream.num_layers)):
            take(stream, index)
        stream.check_integrity()
    for index in range(stream.num_layers):
        take(stream, index)


def test_the_slots_are_filled_ahead_and_no_more_is_read(make_stream: MakeStream) -> None:
    stream, _ = make_stream(5)
    wait_for_bytes(stream, NUM_SLOTS * SIZE)
    with stream.layer(0) as memory:
        # The layer that is computed keeps its slot; the other one is full.
        time.sleep(0.02)
        assert stream.stats().num_bytes == NUM_SLOTS * SIZE
        assert int(memory[0]) == 1
    wait_for_bytes(stream, (NUM_SLOTS + 1) * SIZE)


def test_a_layer_that_cannot_be_read_fails_every_later_step(make_stream: MakeStream) -> None:
    stream, file = make_stream(6)
    os.ftruncate(file.fileno(), 3 * SIZE)
    for index in range(3):
        take(stream, index)
    for index in (3, 4, 0):
        with pytest.raises(WeightReadError, match=r"the file of streamed weights in .* ended"):
            take(stream, index)


def test_a_closed_stream_says_so(make_stream: MakeStream) -> None:
    stream, _ = make_stream(3)
    take(stream, 0)
    stream.close()
    with pytest.raises(WeightReadError, match="is closed"):
        take(stream, 1)


def test_closing_ends_a_step_that_waits(
    make_stream: MakeStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a signal ends the engine while the disk hangs."""
    hangs = threading.Event()
    stopped: list[bool] = []

    def read(self: WeightFile, index: int, into: memoryview, stop: Callable[[], bool]) -> None:
        hangs.set()
        while not stop():
            time.sleep(0.001)
        stopped.append(True)

    monkeypatch.setattr(WeightFile, "read", read)
    stream, _ = make_stream(3)
    errors: list[Exception] = []

    def step() -> None:
        try:
            take(stream, 0)
        except Exception as error:
            errors.append(error)

    waiting = threading.Thread(target=step)
    waiting.start()
    hangs.wait()
    stream.close()
    waiting.join()
    assert isinstance(errors[0], WeightReadError)
    assert stopped == [True]
