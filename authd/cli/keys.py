"""`authd keys list|rotate`"""

import argparse

from authd.assembly.keys import build_keeper
from authd.assembly.postgres import PostgresStores
from authd.cli.terminal import run, say
from authd.config import Settings
from authd.infra.postgres.database import open_database
from authd.tokens.keeper import DATA


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="action")
    actions.add_parser("list", help="all of them").set_defaults(command=lambda _: run(list_keys))
    actions.add_parser("rotate", help="add a next key of each kind; it signs AUTHD_KEY_PUBLISH_S later").set_defaults(
        command=lambda _: run(rotate_keys)
    )


async def list_keys(settings: Settings) -> int:
    async with open_database(settings) as database:
        for key in await build_keeper(settings, PostgresStores(settings, database)).read():
            since = max(key.active_at, key.created_at).isoformat(timespec="seconds")
            use = "never rotates; made" if key.purpose == DATA else "signs from"
            say(f"{key.kid}  {key.purpose:8}  {use} {since}")
    return 0


async def rotate_keys(settings: Settings) -> int:
    async with open_database(settings) as database:
        for kid in await build_keeper(settings, PostgresStores(settings, database)).rotate():
            say(f"{kid}  published; signs in {settings.key_publish_s} s")
    return 0
