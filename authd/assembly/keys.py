"""What makes and reads the key ring, which all that follows is built on."""

from authd.assembly.postgres import PostgresStores
from authd.config import Settings
from authd.tokens.keeper import KeyKeeper, KeySettings


def build_keeper(settings: Settings, postgres: PostgresStores) -> KeyKeeper:
    return KeyKeeper(settings.section(KeySettings), postgres.keys)
