from __future__ import annotations

import asyncio

import pytest

from inference_pio.deployments.generation import Generation
from inference_pio.workers.types import (
    FinishReason,
    GenerateRequest,
    RequestError,
    Resumption,
    SamplingParams,
    Timing,
    TokenChunk,
    TokenKind,
    TokenLogprob,
    Usage,
)


def chunk(
    first: int,
    count: int = 1,
    *,
    index: int = 0,
    finish: FinishReason | None = None,
    error: RequestError | None = None,
    cached: int = 0,
    timing: Timing | None = None,
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None,
) -> TokenChunk:
    return TokenChunk(
        request_id="r",
        index=index,
        first=first,
        token_ids=tuple(range(count)),
        kinds=(TokenKind.CONTENT,) * count,
        usage=Usage(1, cached, first + count, 0),
        prompt_logprobs=prompt_logprobs,
        finish_reason=finish,
        timing=timing,
        error=error,
    )


def request(n: int = 1, prompt_logprobs: int | None = None) -> GenerateRequest:
    return GenerateRequest("r", (1,), SamplingParams(n=n, prompt_logprobs=prompt_logprobs))


async def read(generation: Generation) -> list[TokenChunk]:
    return [chunk async for batch in generation for chunk in batch]


def run(chunks: list[TokenChunk], n: int = 1, limit: int = 100) -> list[TokenChunk]:
    async def main() -> list[TokenChunk]:
        generation = Generation([request(n)], limit, deadline_s=5)
        for item in chunks:
            generation.deliver(item)
        return await read(generation)

    return asyncio.run(main())


def test_chunks_come_in_order_until_every_choice_has_ended() -> None:
    chunks = [
        chunk(0, 2),
        chunk(0, 1, index=1, finish=FinishReason.STOP),
        chunk(2, 3),
        chunk(5, 0, finish=FinishReason.LENGTH),
    ]
    assert run(chunks, n=2) == chunks


@pytest.mark.parametrize(
    ("chunks", "code"),
    [
        ([chunk(1)], "stream_lost"),
        ([chunk(0, 2), chunk(3)], "stream_lost"),
        ([chunk(0, 2), chunk(0, 2)], "stream_lost"),
        ([chunk(0, index=5)], "stream_lost"),
        ([chunk(0, finish=FinishReason.ERROR)], "internal_error"),
        ([chunk(0, 101)], "slow_client"),
    ],
)
def test_what_breaks_a_stream_is_an_error_and_never_silent(
    chunks: list[TokenChunk], code: str
) -> None:
    with pytest.raises(RequestError) as caught:
        run(chunks)
    assert caught.value.code == code


def test_the_engines_own_error_is_passed_on() -> None:
    error = RequestError("too late", code="deadline_exceeded")
    with pytest.raises(RequestError) as caught:
        run([chunk(0, finish=FinishReason.ERROR, error=error)])
    assert caught.value is error


def test_only_what_waits_counts_against_a_slow_reader() -> None:
    async def main() -> None:
        generation = Generation([request()], 10, deadline_s=5)
        for first in range(0, 100, 10):
            generation.deliver(chunk(first, 10))
            assert len(await anext(generation)) == 1
        generation.deliver(chunk(100, 10))
        generation.deliver(chunk(110, 1))
        assert generation.is_over
        assert not generation.is_finished

    asyncio.run(main())


def test_the_deadline_ends_the_wait() -> None:
    async def main() -> None:
        await read(Generation([request()], 10, deadline_s=0.05))

    with pytest.raises(RequestError) as caught:
        asyncio.run(main())
    assert caught.value.code == "deadline_exceeded"


def test_what_remains_goes_on_from_what_has_come() -> None:
    async def main() -> None:
        generation = Generation([request(3)], 100, deadline_s=5)
        (again,) = generation.remaining()
        assert again.resume == ()
        generation.deliver(chunk(0, 2))
        generation.deliver(chunk(2, 1))
        generation.deliver(chunk(0, 1, index=1, finish=FinishReason.STOP))
        (again,) = generation.remaining()
        assert again.resume == (Resumption(0, (0, 1, 0)), Resumption(2, ()))
        assert again.deadline_s is not None
        assert 0 < again.deadline_s <= 5
        generation.deliver(chunk(3, 1, finish=FinishReason.STOP))
        generation.deliver(chunk(0, 1, index=2, finish=FinishReason.STOP))
        assert generation.remaining() == []
        assert generation.is_finished

    asyncio.run(main())


def test_what_a_replica_has_told_another_one_does_not_tell_again() -> None:
    async def main() -> list[TokenChunk]:
        generation = Generation([request(2, prompt_logprobs=1)], 100, deadline_s=5)
        once = (None,)
        generation.deliver(chunk(0, 1, cached=3, timing=Timing(1, 1), prompt_logprobs=once))
        assert generation.remaining()[0].params.prompt_logprobs == 1  # of the second choice
        # Another replica goes on: it counts what it recomputed and times what it did.
        generation.deliver(chunk(1, 1, cached=9, timing=Timing(2, 2), prompt_logprobs=once))
        generation.deliver(chunk(0, 1, index=1, cached=5, prompt_logprobs=once))
        assert generation.remaining()[0].params.prompt_logprobs is None
        return await anext(generation)

    first, second, other = asyncio.run(main())
    assert [c.usage.cached_tokens for c in (first, second, other)] == [3, 3, 5]
    assert (first.timing, second.timing) == (Timing(1, 1), None)
    assert (first.prompt_logprobs, second.prompt_logprobs) == ((None,), None)
    assert other.prompt_logprobs == (None,)
