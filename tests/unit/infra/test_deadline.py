"""The deadline of a request: it ends what ignores one cancellation, and hides nobody else's."""

import asyncio

import anyio
import anyio.lowlevel
import pytest

from authd.infra.tasks.deadline import CANCEL_AGAIN_S, Deadline

SOON_S = 0.01


async def test_a_body_that_is_done_in_time_is_not_ended() -> None:
    with Deadline(60) as deadline:
        await anyio.lowlevel.checkpoint()
    assert not deadline.is_over
    await anyio.lowlevel.checkpoint()


async def test_a_body_that_takes_longer_is_ended_and_the_task_goes_on() -> None:
    with anyio.fail_after(5):
        with Deadline(SOON_S) as deadline:
            await anyio.sleep_forever()
        assert deadline.is_over
        await anyio.sleep(2 * CANCEL_AGAIN_S)  # and no cancellation comes later
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_a_body_that_waits_again_when_it_is_cancelled_is_ended_too() -> None:
    waits = 0
    with anyio.fail_after(5), Deadline(SOON_S) as deadline:
        try:
            await asyncio.Event().wait()
        finally:
            for _ in range(2):
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    waits += 1
    assert deadline.is_over
    assert waits == 2


async def test_it_can_be_ended_before_its_time() -> None:
    with anyio.fail_after(5), Deadline(60) as deadline:
        deadline.end()
        await anyio.sleep_forever()
    assert deadline.is_over


@pytest.mark.parametrize("is_ended_too", [False, True])
async def test_a_cancellation_by_somebody_else_goes_through(is_ended_too: bool) -> None:
    began = asyncio.Event()
    deadline = Deadline(60)

    async def body() -> None:
        with deadline:
            began.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(body())
    await began.wait()
    if is_ended_too:
        deadline.end()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not deadline.is_over


async def test_an_error_of_the_body_goes_through() -> None:
    with pytest.raises(ValueError, match="own"), Deadline(60) as deadline:
        deadline.end()
        try:
            await anyio.sleep_forever()
        finally:
            raise ValueError("own")
    assert not deadline.is_over
