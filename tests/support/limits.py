"""Keeps a failure to its test: limits of time, and what anyio's one runner of a process would not survive.

A limit is a deadline inside the event loop, and a thread far behind it that ends the process.

The limit is that of the `timeout` marker or setting. A signal cannot hold it: Python raises it in whatever frame runs,
where uvloop, which waits in C, swallows it, or where it kills the task that runs every later test of the process.
"""

import asyncio
import faulthandler
import inspect
import os
import sys
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from functools import wraps
from typing import Any, TypeVar

import pytest
import pytest_timeout

#: The process ends where a test, its fixtures included, takes this many times its limit: what blocks cannot be
#: cancelled.
LAST_RESORT_LIMITS = 3
#: What `pytest.fail` and `pytest.skip` raise, which is no Exception.
OUTCOMES = (pytest.fail.Exception, pytest.skip.Exception)

T = TypeVar("T")


def limit_s(node: pytest.Item | pytest.Collector) -> float:
    """Return the seconds that a test, or one step of a fixture of that scope, may take."""
    marker = node.get_closest_marker("timeout")
    return float(marker.args[0] if marker else node.config.getoption("timeout") or node.config.getini("timeout"))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """Give an async test its deadline, before anyio's plugin runs it."""
    test, seconds, name = pyfuncitem.obj, limit_s(pyfuncitem), pyfuncitem.nodeid
    if hasattr(test, "hypothesis"):
        # The limit is that of all examples together.
        end = time.monotonic() + seconds
        inner = getattr(test.hypothesis.inner_test, "_anyio_original_func", test.hypothesis.inner_test)
        if inspect.iscoroutinefunction(inner):
            test.hypothesis.inner_test = _limited(inner, lambda: max(0.0, end - time.monotonic()), seconds, name)
    elif inspect.iscoroutinefunction(test):
        pyfuncitem.obj = _limited(test, lambda: seconds, seconds, name)
    try:
        return (yield)
    finally:
        pyfuncitem.obj = test


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest) -> Iterator[None]:
    """Give the setup and the end of an async fixture a deadline each, before anyio's plugin runs it."""
    fixture, seconds, name = fixturedef.func, limit_s(request.node), f"the fixture {fixturedef.argname}"
    limited: Any = fixture
    if inspect.isasyncgenfunction(fixture):
        limited = _limited_steps(fixture, seconds, name)
    elif inspect.iscoroutinefunction(fixture):
        limited = _limited(fixture, lambda: seconds, seconds, name)
    fixturedef.func = limited  # type: ignore[misc]
    try:
        return (yield)
    finally:
        fixturedef.func = fixture  # type: ignore[misc]


def _limited(
    function: Callable[..., Awaitable[T]], left_s: Callable[[], float], limit_s: float, name: str
) -> Callable[..., Awaitable[T]]:
    @wraps(function)
    async def limited(**arguments: Any) -> T:
        return await _within(function(**arguments), left_s(), limit_s, name)

    return limited


def _limited_steps(
    fixture: Callable[..., AsyncGenerator[T, None]], seconds: float, name: str
) -> Callable[..., AsyncGenerator[T, None]]:
    @wraps(fixture)
    async def limited(**arguments: Any) -> AsyncGenerator[T, None]:
        steps = fixture(**arguments)
        while True:
            try:
                value = await _within(anext(steps), seconds, seconds, name)
            except StopAsyncIteration:
                return
            yield value

    return limited


async def _within(step: Awaitable[T], left_s: float, limit_s: float, name: str) -> T:
    """Raise TimeoutError where the step takes longer, also where it passes over its cancellation.

    A cancel scope of anyio would not do: a fixture, or a test by way of a fixture, enters scopes that it leaves later,
    and scopes have to nest.
    """
    message = f"{name} took longer than its limit of {limit_s:g} s"
    limit = asyncio.timeout(left_s)
    try:
        async with limit:
            result = await step
    except TimeoutError as error:
        if limit.expired():
            raise TimeoutError(message) from error
        raise
    except BaseExceptionGroup as group:
        if (survived := _for_the_runner(group)) is group:
            raise
        raise survived from group
    if limit.expired():
        raise TimeoutError(message)
    return result


def _for_the_runner(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return what anyio's runner survives: `pytest.fail` in a task group comes out as a group that is no Exception."""
    leaves = list(_leaves(group))
    if isinstance(group, Exception) or not all(isinstance(leaf, (Exception, *OUTCOMES)) for leaf in leaves):
        return group
    if len(leaves) == 1:
        return leaves[0]
    return AssertionError(f"{len(leaves)} failures at once: " + "; ".join(map(repr, leaves)))


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


@pytest.hookimpl(tryfirst=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> bool:
    """Start the thread that ends the process, instead of pytest-timeout's own, which names no test."""
    seconds = LAST_RESORT_LIMITS * settings.timeout
    timer = threading.Timer(seconds, _end_process, (item, seconds))
    timer.daemon = True
    timer.start()
    item.cancel_timeout = timer.cancel  # type: ignore[attr-defined]
    return True


def _end_process(item: pytest.Item, seconds: float) -> None:
    """Name the test, write what it printed and what every thread does, and end the process with code 1."""
    if pytest_timeout.is_debugging():
        return
    capture: Any = item.config.pluginmanager.get_plugin("capturemanager")
    capture.suspend_global_capture(in_=True)
    # To stderr: xdist's workers have no other way to the log.
    sys.stderr.write(f"\nHANGS {item.nodeid}: the process ends after {seconds:g} s.\n")
    sys.stderr.writelines(capture.read_global_capture())
    sys.stderr.flush()
    faulthandler.dump_traceback(sys.stderr, all_threads=True)
    os._exit(1)
