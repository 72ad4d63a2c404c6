"""`authd restored`"""

import argparse

from authd.assembly.postgres import PostgresStores
from authd.cli.migrate import migrate
from authd.cli.terminal import run, say
from authd.config import Settings
from authd.infra.postgres.database import open_database


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=lambda _: run(restored))


async def restored(settings: Settings) -> int:
    """Do what has to be done once after Postgres was restored from a backup, before the first replica starts."""
    await migrate(settings)  # the backup may be of an older version
    async with open_database(settings) as database:
        done = await PostgresStores(settings, database).deployment.mark_restored()
    say(f"New users get ids above {done.last_user_id}.")
    say(f"Restored at {done.restored_at.isoformat(timespec='seconds')}; the log of endings is {done.log_id} now.")
    say(f"Delete the keys authd:{settings.deployment}:* in Redis before a replica starts.")
    return 0
