"""Real Postgres, Redis and Kafka as child processes, for `authd dev` and the tests. Never part of a production start.

Start them from the main thread: on Linux a server is killed when the *thread* that started it ends.
"""

from authd.embedded.kafka import JavaTools, KafkaBroker, fetch_libs, find_java_and_maven
from authd.embedded.postgres import PostgresServer
from authd.embedded.processes import EmbeddedServer, StoreError
from authd.embedded.redis import RedisCluster, RedisServer

__all__ = [
    "EmbeddedServer",
    "JavaTools",
    "KafkaBroker",
    "PostgresServer",
    "RedisCluster",
    "RedisServer",
    "StoreError",
    "fetch_libs",
    "find_java_and_maven",
]
