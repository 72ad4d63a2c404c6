"""The suite's own machinery: a test that takes too long fails, and takes no other test with it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import TESTS

#: Nothing here takes a tenth of it. A run that does not end by itself fails the test.
RUN_S = 150
PLUGINS = ("-p", "support.limits", "-p", "no:cacheprovider")

INI = """
[pytest]
anyio_mode = auto
timeout = 1
timeout_method = thread
"""
BACKEND = """
import threading
from contextlib import AsyncExitStack

import anyio
from support import limits
import pytest
from hypothesis import given, settings, strategies

@pytest.fixture(scope="session")
def anyio_backend():
    return "asyncio", {"use_uvloop": True}
"""
WAITING = """
# A busy machine takes long to write a traceback: the last resort stays out of this.
limits.LAST_RESORT_LIMITS = 1000

@pytest.fixture
async def slow_to_come():
    await anyio.sleep(3600)

@pytest.fixture
async def slow_to_begin():
    await anyio.sleep(3600)
    yield

@pytest.fixture
async def slow_to_end():
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.sleep, 3600)
        yield

@pytest.fixture(scope="session")
async def held_by_all():
    async with anyio.create_task_group() as tasks:
        yield "held"
        tasks.cancel_scope.cancel()

async def test_waits(held_by_all):
    await anyio.sleep(3600)

async def test_after_the_wait(held_by_all):
    assert held_by_all == "held"

async def test_waits_for_a_task_group():
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.sleep, 3600)

@pytest.fixture
async def stack():
    async with AsyncExitStack() as stack:
        yield stack

async def test_enters_what_a_fixture_leaves(stack):
    tasks = await stack.enter_async_context(anyio.create_task_group())
    tasks.start_soon(anyio.sleep, 0)

async def test_waits_in_what_a_fixture_leaves(stack):
    await stack.enter_async_context(anyio.create_task_group())
    await anyio.sleep(3600)

async def test_overhears_the_end():
    try:
        await anyio.sleep(3600)
    except BaseException:
        pass

@settings(deadline=None, max_examples=10)
@given(strategies.integers())
async def test_waits_in_an_example(number):
    await anyio.sleep(3600)

@pytest.mark.timeout(3600)
async def test_has_a_limit_of_its_own():
    await anyio.sleep(1.2)

async def test_wants_what_does_not_come(slow_to_come):
    pass

async def test_wants_what_does_not_begin(slow_to_begin):
    pass

async def test_wants_what_does_not_end(slow_to_end):
    pass

async def test_fails_by_a_timeout_of_its_own():
    with anyio.fail_after(0.01):
        await anyio.sleep(3600)

async def test_fails_in_a_task_group():
    async with anyio.create_task_group():
        pytest.fail("seen in the log")

async def test_fails_twice_in_a_task_group():
    async def fail():
        try:
            await anyio.sleep(3600)
        finally:
            pytest.fail("the other one")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(fail)
        await anyio.sleep(0)
        raise OSError("this one")

async def test_skips_in_a_task_group():
    async with anyio.create_task_group():
        pytest.skip("not here")

@pytest.fixture
async def failing_at_its_end():
    async with anyio.create_task_group():
        yield
        pytest.fail("at the end")

async def test_wants_what_fails_at_its_end(failing_at_its_end):
    pass

async def test_last(held_by_all):
    assert held_by_all == "held"
"""
BLOCKING = """
def test_before():
    pass

async def test_blocks_the_loop():
    print("seen in the log")
    threading.Event().wait()

def test_after():
    pass
"""


def run(folder: Path, tests: str, *options: str) -> "subprocess.CompletedProcess[str]":
    (folder / "pytest.ini").write_text(INI)
    (folder / "test_tiny.py").write_text(BACKEND + tests)
    return subprocess.run(
        [sys.executable, "-m", "pytest", *PLUGINS, "-rA", "--tb=short", *options],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        timeout=RUN_S,
    )


def results(output: str, word: str) -> set[str]:
    lines = (line.split(" - ")[0] for line in output.splitlines() if line.startswith(f"{word} test_tiny.py::"))
    return {line.partition("::")[2] for line in lines}


def test_an_async_test_or_fixture_that_waits_too_long_or_fails_takes_no_other_test_along(tmp_path: Path) -> None:
    done = run(tmp_path, WAITING)
    assert results(done.stdout, "PASSED") == {
        "test_after_the_wait",
        "test_enters_what_a_fixture_leaves",
        "test_has_a_limit_of_its_own",
        "test_wants_what_does_not_end",
        "test_wants_what_fails_at_its_end",
        "test_last",
    }, done.stdout
    assert results(done.stdout, "FAILED") == {
        "test_waits",
        "test_waits_for_a_task_group",
        "test_waits_in_what_a_fixture_leaves",
        "test_overhears_the_end",
        "test_waits_in_an_example",
        "test_fails_by_a_timeout_of_its_own",
        "test_fails_in_a_task_group",
        "test_fails_twice_in_a_task_group",
    }
    assert results(done.stdout, "ERROR") == {
        "test_wants_what_does_not_come",
        "test_wants_what_does_not_begin",
        "test_wants_what_does_not_end",
        "test_wants_what_fails_at_its_end",
    }
    assert "1 skipped" in done.stdout
    assert done.returncode == pytest.ExitCode.TESTS_FAILED
    # The log says which limit it was, and shows the line that waited.
    assert "test_tiny.py::test_waits took longer than its limit of 1 s" in done.stdout
    assert "the fixture slow_to_begin took longer than its limit of 1 s" in done.stdout
    assert "seen in the log" in done.stdout and "the other one" in done.stdout and "this one" in done.stdout
    assert "in test_waits\n    await anyio.sleep(3600)" in done.stdout


@pytest.mark.parametrize("options", [(), ("--numprocesses=1", "--dist=loadfile", "--max-worker-restart=0")])
def test_a_test_that_blocks_ends_its_process_which_names_it(tmp_path: Path, options: tuple[str, ...]) -> None:
    done = run(tmp_path, BLOCKING, *options)
    assert done.returncode == 1
    assert "HANGS test_tiny.py::test_blocks_the_loop" in done.stderr
    assert "seen in the log" in done.stderr and "in test_blocks_the_loop" in done.stderr
    assert "test_after" not in done.stdout
