"""Several processes on the same listening sockets: a parent that only starts whole trees and forwards signals."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

import structlog

from authd.config import Settings
from authd.infra.http.server.listening import Listeners

_log = structlog.get_logger()


def run_workers(settings: Settings, listeners: Listeners) -> int:
    """Start `settings.workers` processes and wait for all; return the first exit status that is not 0.

    When one ends unasked the others are stopped, and the orchestrator starts the whole again.
    """
    life, own_life = os.pipe()  # closed by the parent's end, however it comes
    with tempfile.TemporaryDirectory(prefix="authd-metrics-") as metrics_folder:
        environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": metrics_folder}
        # The children's pids come with their handles; a signal that comes before is held back until then.
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
        command = [sys.executable, "-m", "authd", "serve", f"--fd={listeners.public.fileno()}", f"--life={life}"]
        passed = [listener for listener in listeners if listener is not None]
        if listeners.operations is not None:
            command.append(f"--operations-fd={listeners.operations.fileno()}")
        children = [
            subprocess.Popen(  # noqa: S603
                [*command, f"--worker={worker}"],
                pass_fds=[*(listener.fileno() for listener in passed), life],
                env=environment,
                # A terminal's Ctrl-C goes to the parent alone, which forwards it: else it would count twice.
                start_new_session=True,
                preexec_fn=_unblock_signals,
            )
            for worker in range(settings.workers)
        ]
        # While the parent holds a socket, clients can connect to it when no child is left, and hang.
        for listener in passed:
            listener.close()
        os.close(life)

        left = {child.pid: child for child in children}
        are_told = False

        def forward(number: int, _: FrameType | None = None) -> None:
            nonlocal are_told
            are_told = True
            for pid in list(left):
                # Not by Popen.send_signal: it reaps a child that has just ended, for which _wait would wait in vain.
                with suppress(ProcessLookupError):
                    os.kill(pid, number)

        def stop_others() -> None:
            # Told twice, a worker would drop what it still has to answer.
            if not are_told:
                forward(signal.SIGTERM)

        signal.signal(signal.SIGTERM, forward)
        signal.signal(signal.SIGINT, forward)
        _unblock_signals()
        status = _wait(left, stop_others)
    os.close(own_life)
    return status


def stop_with_parent(life: int) -> None:
    """Stop in order when the parent has ended: a new one could not listen while its orphans do."""

    def watch() -> None:
        os.read(life, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="life of the parent", daemon=True).start()


def _wait(left: dict[int, subprocess.Popen[bytes]], stop_others: Callable[[], None]) -> int:
    status = 0
    while left:
        pid, raw = os.waitpid(-1, 0)
        child = left.pop(pid, None)
        if child is None:
            continue
        child.returncode = os.waitstatus_to_exitcode(raw)
        if child.returncode != 0 and status == 0:
            status = abs(child.returncode)
            _log.error("worker_ended", pid=pid, status=child.returncode)
        stop_others()
    return status


def _unblock_signals() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT))
