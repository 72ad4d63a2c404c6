"""`authd outbox list|retry|drop`"""

import argparse
from collections.abc import Iterable, Sequence
from functools import partial

from authd.assembly.postgres import PostgresStores
from authd.cli.terminal import complain, run, say
from authd.config import Settings
from authd.events.postgres import PARKED_ROWS
from authd.infra.postgres.database import open_database


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="action")
    actions.add_parser("list", help="how many wait, since when, and those that are parked").set_defaults(
        command=lambda _: run(list_outbox)
    )
    retry = actions.add_parser("retry", help="try parked events again")
    which = retry.add_mutually_exclusive_group(required=True)
    which.add_argument("ids", nargs="*", type=_row_id, default=[], metavar="id")
    which.add_argument("--all", action="store_true", help="all of them")
    retry.set_defaults(command=lambda options: run(partial(retry_outbox, ids=None if options.all else options.ids)))
    drop = actions.add_parser("drop", help="delete parked events, unsent")
    drop.add_argument("ids", nargs="+", type=_row_id, metavar="id")
    drop.set_defaults(command=lambda options: run(partial(drop_outbox, ids=options.ids)))


async def list_outbox(settings: Settings) -> int:
    """Print what waits, and a line for each parked event; never its value, which is about a person."""
    async with open_database(settings) as database:
        outbox = PostgresStores(settings, database).outbox
        backlog, parked = await outbox.backlog(), await outbox.parked()
    say(f"waiting: {backlog.events}, the oldest for {backlog.oldest_s:.0f} s")
    say(f"parked: {backlog.parked}")
    for row in parked:
        say(
            f"{row.id}  {row.type}  channel={row.channel}  user={row.user_id}  attempts={row.attempts}"
            f"  error={row.last_error}  age={row.age_s:.0f}s"
        )
    if backlog.parked > len(parked):
        say(f"These are the {PARKED_ROWS} oldest.")
    return 0


async def retry_outbox(settings: Settings, ids: Sequence[int] | None) -> int:
    """Give parked events their attempts again; None: all of them."""
    async with open_database(settings) as database, database.transaction() as connection:
        unparked = await PostgresStores(settings, database).outbox.unpark(connection, ids)
    for row_id in sorted(unparked.retried):
        say(f"{row_id}  waits for the broker again")
    for row_id in sorted(unparked.overtaken):
        say(f"{row_id}  dropped: its revocation is over, or a newer one says more")
    return _complain_of_missing(ids or [], {*unparked.retried, *unparked.overtaken})


async def drop_outbox(settings: Settings, ids: Sequence[int]) -> int:
    async with open_database(settings) as database:
        dropped = await PostgresStores(settings, database).outbox.drop(ids)
    for row_id in sorted(dropped):
        say(f"{row_id}  dropped")
    return _complain_of_missing(ids, set(dropped))


def _complain_of_missing(wanted: Iterable[int], found: set[int]) -> int:
    missing = sorted(set(wanted) - found)
    return complain(f"Not parked: {', '.join(map(str, missing))}.") if missing else 0


def _row_id(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a row id")
    return int(text)
