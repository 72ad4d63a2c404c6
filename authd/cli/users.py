"""`authd users show|disable|enable|unlock`"""

import argparse
from functools import partial
from ipaddress import ip_address

from authd.assembly.postgres import PostgresStores
from authd.cli.terminal import complain, run, say
from authd.config import Settings
from authd.errors import Unavailable
from authd.infra.postgres.database import open_database
from authd.infra.tasks.running import running
from authd.users.usernames import username_key


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="action")
    for name, command, help_text in (
        ("show", show_user, "what is known of a user"),
        ("disable", disable_user, "refuse its logins and end its sessions, at once and everywhere"),
        ("enable", enable_user, "let it log in again"),
    ):
        action = actions.add_parser(name, help=help_text)
        action.add_argument("username")
        action.set_defaults(command=lambda options, command=command: run(partial(command, username=options.username)))
    unlock = actions.add_parser(
        "unlock", help="forget the failed logins of a user, and with --address those from there"
    )
    unlock.add_argument("username")
    unlock.add_argument("--address", type=ip_address, help="the client's IP address")
    unlock.set_defaults(
        command=lambda options: run(
            partial(unlock_user, username=options.username, address=options.address and str(options.address))
        )
    )


async def show_user(settings: Settings, username: str) -> int:
    async with open_database(settings) as database:
        user = await PostgresStores(settings, database).users.find_by_username_key(username_key(username))
    if user is None:
        return _no_user()
    state = "disabled" if user.disabled else "active"
    say(f"{user.id} {user.username} {state}, registered {user.created_at.isoformat()}, version {user.version}")
    return 0


async def disable_user(settings: Settings, username: str) -> int:
    return await _set_disabled(settings, username, disabled=True)


async def enable_user(settings: Settings, username: str) -> int:
    return await _set_disabled(settings, username, disabled=False)


async def unlock_user(settings: Settings, username: str, address: str | None) -> int:
    """Forget the failures of the account, and of its pair with the address. Print what stays locked."""
    # Redis and the keys' libraries, for which the other commands need not wait.
    from authd.assembly.keys import build_keeper
    from authd.assembly.redis import build_throttle
    from authd.infra.redis.client import open_redis

    account = username_key(username)
    async with open_database(settings) as database, open_redis(settings) as redis:
        ring = await build_keeper(settings, PostgresStores(settings, database)).load()
        throttle = build_throttle(settings, redis, ring)
        forgiven = await throttle.forgive(account, address)
        say(f"Account: forgot {forgiven.account} failures.")
        if address is None:
            say("Pairs of address and account cannot be listed: name one with --address to unlock it, too.")
            return 0
        say(f"Pair with {address}: forgot {forgiven.pair} failures.")
        locked_s = await throttle.locked_s(address, account)
    if locked_s is not None:
        say(f"{address} itself is locked for {locked_s} s more, for its failures on any accounts.")
    return 0


async def _set_disabled(settings: Settings, username: str, *, disabled: bool) -> int:
    from authd.assembly.redis import RedisStores
    from authd.infra.redis.client import open_redis
    from authd.sessions.feed import RevocationFeed

    async with open_database(settings) as database, open_redis(settings) as redis:
        stores = PostgresStores(settings, database)
        row = await stores.disabling.set_disabled(username_key(username), disabled=disabled)
        if row is None:
            return _no_user(f"or already {'disabled' if disabled else 'enabled'}")
        feed = RevocationFeed(stores.revocations, stores.endings, RedisStores(settings, redis).sessions)
        async with running(feed.run):
            try:
                await feed.wait_applied(row.bucket, row.number)
            except Unavailable:
                say("Done in Postgres. Redis is unavailable and will apply it before it serves this user.")
                return 0
    say("Done.")
    return 0


def _no_user(more: str = "") -> int:
    return complain(f"No such user{', ' * bool(more)}{more}.")
