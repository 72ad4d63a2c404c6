"""`authd clients add|list|remove`"""

import argparse
from functools import partial

from authd.assembly.postgres import PostgresStores
from authd.cli.terminal import complain, run, say
from authd.config import Settings
from authd.infra.postgres.database import open_database
from authd.oauth.clients import FRESH_S, ClientRegistry


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="action")
    add = actions.add_parser("add", help="register one and print its secret, once")
    add.add_argument("name")
    add.set_defaults(command=lambda options: run(partial(add_client, name=options.name)))
    actions.add_parser("list", help="all of them").set_defaults(command=lambda _: run(list_clients))
    remove = actions.add_parser("remove", help="forget one")
    remove.add_argument("client_id")
    remove.set_defaults(command=lambda options: run(partial(remove_client, client_id=options.client_id)))


async def add_client(settings: Settings, name: str) -> int:
    async with open_database(settings) as database:
        client = await ClientRegistry(PostgresStores(settings, database).clients).add(name)
    say(f"client_id={client.client_id}\nclient_secret={client.secret}")
    return 0


async def list_clients(settings: Settings) -> int:
    async with open_database(settings) as database:
        for client in await PostgresStores(settings, database).clients.list_all():
            say(f"{client.client_id}  {client.created_at.isoformat(timespec='seconds')}  {client.name}")
    return 0


async def remove_client(settings: Settings, client_id: str) -> int:
    async with open_database(settings) as database:
        if not await PostgresStores(settings, database).clients.delete(client_id):
            return complain("No such client.")
    say(f"Removed. Running replicas forget it within {FRESH_S:.0f} s.")
    return 0
