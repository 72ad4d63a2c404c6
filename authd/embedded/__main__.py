"""`python -m authd.embedded` fetches what the embedded stores need from the network, so that later starts need none."""

import sys

import anyio

from authd.embedded.kafka import fetch_libs, find_java_and_maven

if __name__ == "__main__":
    if missing := find_java_and_maven().missing:
        sys.stderr.write(f"Kafka was not fetched: this machine lacks {missing}\n")
    else:
        anyio.run(fetch_libs)
