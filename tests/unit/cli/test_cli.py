"""A command imports only what it uses: `authd --version` no driver, an operator's command no server."""

import subprocess
import sys

import pytest

from authd.cli.main import COMMANDS, main

HEAVY = {"aiokafka", "asyncpg", "cryptography", "hypercorn", "msgspec", "quart", "redis"}
#: Runs a command line and then names the heavy packages that it imported.
PROGRAM = f"""
import sys
from authd.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
print()
print(*sorted({HEAVY!r} & sys.modules.keys()))
"""


def imported_by(*arguments: str) -> set[str]:
    """The heavy packages that a process of its own imports for a command line."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["no-such-command"], []])
def test_what_needs_no_command_imports_no_driver(arguments: list[str]) -> None:
    assert imported_by(*arguments) == set()


@pytest.mark.parametrize("command", ["migrate", "restored", "clients", "outbox", "users"])
def test_a_command_for_postgres_alone_imports_no_other_client_and_no_server(command: str) -> None:
    imported = imported_by(command, "--help")
    assert "asyncpg" in imported
    assert imported & {"aiokafka", "hypercorn", "quart", "redis"} == set()


@pytest.mark.parametrize("command", ["keys", "check"])
def test_no_operators_command_imports_the_server(command: str) -> None:
    assert imported_by(command, "--help") & {"hypercorn", "quart"} == set()


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_describes_its_arguments(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert f"authd {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [["no-such-command"], ["users"], ["outbox", "drop", "x"], ["outbox", "retry"], ["clients", "add"]]
)
def test_arguments_that_make_no_command_end_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "usage: authd" in capsys.readouterr().err
