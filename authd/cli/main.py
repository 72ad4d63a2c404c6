"""Finds the command, runs it, and turns what it raises into sentences and an exit status."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module

from authd import __version__

#: 0: done; 1: a part failed or refused; 2: the settings or the arguments are unusable.
OK, FAILED, UNUSABLE = 0, 1, 2

#: Each is a module beside this one, whose `add_arguments` describes the rest of its command line.
COMMANDS = {
    "serve": "serve, with the settings of the environment and of .env",
    "dev": "serve with an own Postgres, Redis and Kafka, kept in a folder",
    "migrate": "bring the schema up to date (serve does so too)",
    "restored": "run once after Postgres was restored from a backup",
    "check": "say whether the settings are usable and every part answers",
    "users": "look at, disable, enable and unlock users",
    "clients": "register services that may ask about tokens",
    "keys": "look at and rotate the keys of tokens",
    "outbox": "list the events that wait or are parked, retry or drop them",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status of the process."""
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    try:
        status: int = options.command(options)
        return status
    except (Exception, KeyboardInterrupt, BaseExceptionGroup) as error:
        found = _explain(list(_leaves(error)))
        if found is None:
            raise
        sentences, status = found
    for sentence in sentences:
        print(f"authd: {sentence}", file=sys.stderr)  # noqa: T201
    return status


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="authd", description="Authentication service.")
    parser.add_argument("--version", action="version", version=f"authd {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    chosen = next((argument for argument in arguments if not argument.startswith("-")), None)
    for name, help_text in COMMANDS.items():
        command = commands.add_parser(name, help=help_text)
        if name == chosen:
            # The only import of a command: each takes what others do not need, and some half a second.
            import_module(f"authd.cli.{name}").add_arguments(command)
    return parser.parse_args(arguments)


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


def _explain(errors: Sequence[BaseException]) -> tuple[list[str], int] | None:
    """Return the sentences and the exit status; None where one of the errors is a bug."""
    from authd.config import ConfigError
    from authd.errors import Unavailable
    from authd.infra.clocks import WrongClock
    from authd.infra.postgres.migrate import MIGRATION_ERRORS
    from authd.tokens.keeper import SealedByAnotherSecret

    if all(isinstance(error, KeyboardInterrupt) for error in errors):
        return [], FAILED
    if all(isinstance(error, ConfigError) for error in errors):
        return [sentence for error in errors for sentence in error.args], UNUSABLE
    # What ends a start with a sentence and not with a traceback.
    if all(isinstance(error, (Unavailable, WrongClock, SealedByAnotherSecret, *MIGRATION_ERRORS)) for error in errors):
        return [_sentence(error) for error in errors], FAILED
    return None


def _sentence(error: BaseException) -> str:
    from authd.errors import Unavailable

    if isinstance(error, Unavailable):
        cause = error.__cause__
        return f"{error.detail} ({type(cause).__name__}: {cause})" if cause is not None else error.detail
    return str(error) or type(error).__name__
