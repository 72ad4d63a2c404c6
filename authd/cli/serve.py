"""`authd serve`"""

import argparse
import os
import socket

import anyio

from authd import runtime
from authd.cli.workers import run_workers, stop_with_parent
from authd.config import load_settings
from authd.infra.http.server.listening import Listeners, open_listeners
from authd.infra.observe.logs import start_logs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # What a parent gives its workers: two sockets, a number, and a pipe that ends with the parent.
    parser.add_argument("--fd", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--operations-fd", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--life", type=int, help=argparse.SUPPRESS)
    parser.set_defaults(command=serve)


def serve(options: argparse.Namespace) -> int:
    """Serve until a signal, in this process or, with `AUTHD_WORKERS` above 1, in several that it starts."""
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
    return 0
