"""`authd migrate`"""

import argparse

from authd.cli.terminal import run, say
from authd.config import Settings
from authd.infra.postgres.migrate import migrate as run_migrations


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=lambda _: run(migrate))


async def migrate(settings: Settings) -> int:
    names = await run_migrations(settings)
    say("\n".join(f"applied {name}" for name in names) or "The schema is up to date.")
    return 0
