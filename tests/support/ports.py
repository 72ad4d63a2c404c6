"""Gives each process of tests ports that no other one takes: the runs of a machine do not see each other's choices."""

import fcntl
import os
import tempfile
from pathlib import Path

from authd.embedded import processes

SLICE_PORTS = 400


def take_slice() -> None:
    """Let `free_port` choose from a slice of its ports that is this process's until it ends."""
    folder = Path(tempfile.gettempdir()) / f"authd-tests-ports-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    for start in range(processes.PORTS.start, processes.PORTS.stop, SLICE_PORTS):
        lock = os.open(folder / str(start), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        processes.PORTS = range(start, start + SLICE_PORTS)
        return
    raise RuntimeError("every slice of the ports is taken by another process of tests")
