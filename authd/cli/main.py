"""The commands: serve, dev, migrate, restored, check, users, clients, keys, outbox."""

import argparse
import os
import socket
import sys
from collections.abc import Coroutine, Iterator, Sequence
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import anyio

from authd import __version__, runtime
from authd.cli import admin
from authd.cli.workers import run_workers, stop_with_parent
from authd.config import ConfigError, Settings, load_settings
from authd.errors import Unavailable
from authd.infra.http.server.listening import Listeners, open_listeners
from authd.infra.observe.logs import start_logs

#: 0: done; 1: a part failed or refused; 2: the settings or the arguments are unusable.
OK, FAILED, UNUSABLE = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status of the process."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.command(options)
        return status
    except ConfigError as error:
        return _complain(error.args, UNUSABLE)
    except KeyboardInterrupt:
        return FAILED
    except BaseExceptionGroup as group:
        errors = list(_leaves(group))
        if all(isinstance(error, KeyboardInterrupt) for error in errors):
            return FAILED
        if all(isinstance(error, ConfigError) for error in errors):
            return _complain([sentence for error in errors for sentence in error.args], UNUSABLE)
        known = [error for error in errors if isinstance(error, _EXPECTED)]
        if len(known) < len(errors):
            raise
        return _complain([_sentence(error) for error in known], FAILED)
    except _EXPECTED as error:
        return _complain([_sentence(error)], FAILED)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="authd", description="Authentication service.")
    parser.add_argument("--version", action="version", version=f"authd {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    serve = commands.add_parser("serve", help="serve, with the settings of the environment and of .env")
    serve.add_argument("--fd", type=int, help=argparse.SUPPRESS)
    serve.add_argument("--operations-fd", type=int, help=argparse.SUPPRESS)
    serve.add_argument("--worker", type=int, default=0, help=argparse.SUPPRESS)
    serve.add_argument("--life", type=int, help=argparse.SUPPRESS)
    serve.set_defaults(command=_serve)

    dev = commands.add_parser("dev", help="serve with an own Postgres, Redis and Kafka, kept in a folder")
    dev.add_argument("--data", type=Path, default=Path(".authd-dev"), help="the folder (default: .authd-dev)")
    dev.set_defaults(command=_dev)

    migrate = commands.add_parser("migrate", help="bring the schema up to date (serve does so too)")
    migrate.set_defaults(command=lambda _: _run(admin.migrate))

    restored = commands.add_parser("restored", help="run once after Postgres was restored from a backup")
    restored.set_defaults(command=lambda _: _run(admin.restored))

    check = commands.add_parser("check", help="say whether the settings are usable and every part answers")
    check.set_defaults(command=lambda _: _run(admin.check))

    users = commands.add_parser("users", help="look at, disable, enable and unlock users").add_subparsers(
        required=True, metavar="action"
    )
    for name, action, help_text in (
        ("show", admin.show_user, "what is known of a user"),
        ("disable", admin.disable_user, "refuse its logins and end its sessions, at once and everywhere"),
        ("enable", admin.enable_user, "let it log in again"),
    ):
        user = users.add_parser(name, help=help_text)
        user.add_argument("username")
        user.set_defaults(command=lambda options, action=action: _run(partial(action, username=options.username)))

    unlock = users.add_parser("unlock", help="forget the failed logins of a user, and with --address those from there")
    unlock.add_argument("username")
    unlock.add_argument("--address", type=ip_address, help="the client's IP address")
    unlock.set_defaults(
        command=lambda options: _run(
            partial(admin.unlock_user, username=options.username, address=options.address and str(options.address))
        )
    )

    clients = commands.add_parser("clients", help="register services that may ask about tokens").add_subparsers(
        required=True, metavar="action"
    )
    client = clients.add_parser("add", help="register one and print its secret, once")
    client.add_argument("name")
    client.set_defaults(command=lambda options: _run(partial(admin.add_client, name=options.name)))
    client = clients.add_parser("list", help="all of them")
    client.set_defaults(command=lambda _: _run(admin.list_clients))
    client = clients.add_parser("remove", help="forget one")
    client.add_argument("client_id")
    client.set_defaults(command=lambda options: _run(partial(admin.remove_client, client_id=options.client_id)))

    keys = commands.add_parser("keys", help="look at and rotate the keys of tokens").add_subparsers(
        required=True, metavar="action"
    )
    keys.add_parser("list", help="all of them").set_defaults(command=lambda _: _run(admin.list_keys))
    keys.add_parser("rotate", help="add a next key of each kind; it signs AUTHD_KEY_PUBLISH_S later").set_defaults(
        command=lambda _: _run(admin.rotate_keys)
    )
    _add_outbox(commands)
    return parser


def _add_outbox(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    outbox = commands.add_parser("outbox", help="look at the events that wait or were set aside").add_subparsers(
        required=True, metavar="action"
    )
    outbox.add_parser("list", help="how many wait, since when, and those set aside").set_defaults(
        command=lambda _: _run(admin.list_outbox)
    )
    retry = outbox.add_parser("retry", help="try events that were set aside again")
    which = retry.add_mutually_exclusive_group(required=True)
    which.add_argument("ids", nargs="*", type=_row_id, default=[], metavar="id")
    which.add_argument("--all", action="store_true", help="all of them")
    retry.set_defaults(
        command=lambda options: _run(partial(admin.retry_outbox, ids=None if options.all else options.ids))
    )
    drop = outbox.add_parser("drop", help="delete events that were set aside, unsent")
    drop.add_argument("ids", nargs="+", type=_row_id, metavar="id")
    drop.set_defaults(command=lambda options: _run(partial(admin.drop_outbox, ids=options.ids)))


def _row_id(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a row id")
    return int(text)


def _serve(options: argparse.Namespace) -> int:
    settings = load_settings(os.environ)
    if options.fd is not None:
        start_logs(settings, options.worker)
        stop_with_parent(options.life)
        inner = options.operations_fd
        listeners = Listeners(
            socket.socket(fileno=options.fd), socket.socket(fileno=inner) if inner is not None else None
        )
    else:
        is_parent = settings.workers > 1
        # The first worker has the file: two processes cannot rotate one.
        start_logs(settings, None if is_parent else 0)
        listeners = open_listeners(settings)
        if is_parent:
            return run_workers(settings, listeners)
    anyio.run(runtime.run, settings, listeners, backend_options={"use_uvloop": True})
    return OK


def _dev(options: argparse.Namespace) -> int:
    from authd.cli.dev import run_dev  # needs the extra `authd[dev]`

    return anyio.run(run_dev, options.data, backend_options={"use_uvloop": True})


def _run(command: "partial[Coroutine[Any, Any, int]] | Any") -> int:
    settings: Settings = load_settings(os.environ)
    status: int = anyio.run(command, settings, backend_options={"use_uvloop": True})
    return status


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


_EXPECTED = (Unavailable, *runtime.START_ERRORS)


def _sentence(error: BaseException) -> str:
    if isinstance(error, Unavailable):
        cause = error.__cause__
        return f"{error.detail} ({type(cause).__name__}: {cause})" if cause is not None else error.detail
    return str(error) or type(error).__name__


def _complain(sentences: Sequence[str], status: int) -> int:
    for sentence in sentences:
        print(f"authd: {sentence}", file=sys.stderr)  # noqa: T201
    return status
