"""Owns a server process: one per folder, on loopback, never outliving the process that started it.

The folder holds the data, `server.log`, the owner's lock and a record of the running process, so that the next owner
can end what a killed one left behind. File work happens in threads: the event loop is the service's own in `authd dev`.
"""

import fcntl
import itertools
import json
import os
import secrets
import signal
import socket
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from subprocess import DEVNULL, STDOUT
from types import TracebackType
from typing import ClassVar, Self

import anyio
import anyio.abc
import psutil
from anyio import to_thread

GUARD = Path(__file__).with_name("guard.py")
#: SIGKILL and not a politer one: it ends frozen servers too, and all three kinds are crash-safe.
DEATH_SIGNAL = signal.SIGKILL

#: Below every system's ephemeral range: there, a client's own outgoing connection may sit on a stopped server's port,
#: and a client that retries against it can even connect to itself.
PORTS = range(20_000, 32_000)
PORT_ATTEMPTS = 5
#: Begins anywhere, so that two processes seldom try the same ones.
_given = itertools.count(secrets.randbelow(len(PORTS)))
POLL_S = 0.02
KILL_S = 10.0
LOG_TAIL_CHARS = 3_000
#: Two processes that share a pid and started within this long of each other are one; the clock may have been adjusted.
SAME_START_S = 5.0


class StoreError(Exception):
    """An embedded store cannot do what was asked. The message is a sentence for the person at the terminal."""


class EmbeddedServer(ABC):
    """One server process with its folder. Start, stop, kill and start again keep the port and the data."""

    name: ClassVar[str]
    start_s: ClassVar[float] = 30.0
    stop_s: ClassVar[float] = 15.0
    stop_signal: ClassVar[signal.Signals] = signal.SIGTERM

    def __init__(self, folder: Path, port: int | None = None) -> None:
        self.folder = folder.absolute()
        self._port = port
        self._port_is_ours_to_choose = port is None
        self._process: anyio.abc.Process | None = None
        self._owner_fd: int | None = None

    @abstractmethod
    async def _prepare(self) -> None:
        """Write what the server needs before it starts. Runs again for every start."""

    @abstractmethod
    async def _spawn(self) -> anyio.abc.Process: ...

    @abstractmethod
    async def _is_ready(self, pid: int) -> bool: ...

    @property
    def port(self) -> int:
        if self._port is None:
            raise StoreError(f"{self.name} has no port before its first start")
        return self._port

    @property
    def pid(self) -> int | None:
        return self._process.pid if self.is_running and self._process else None

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    @property
    def log_path(self) -> Path:
        return self.folder / "server.log"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Return when the server answers. Ends a server that a killed owner left running on this folder."""
        if self.is_running:
            raise StoreError(f"{self.name} in {self.folder} is already running")
        await self.kill()
        self._owner_fd = await to_thread.run_sync(_own, self.folder)
        try:
            with anyio.fail_after(self.start_s):
                await to_thread.run_sync(_end_leftover, self.folder)
                await self._launch()
        except TimeoutError:
            tail = await to_thread.run_sync(_tail, self.log_path)
            await self.kill()
            raise StoreError(f"{self.name} did not answer within {self.start_s:g} s:\n{tail}") from None
        except BaseException:
            await self.kill()
            raise

    async def stop(self) -> None:
        """Let the server finish in order, or kill it at the deadline. Does nothing when it is not running."""
        if self._process is not None and self._process.returncode is None:
            with anyio.move_on_after(self.stop_s, shield=True):
                await self.resume()
                self._process.send_signal(self.stop_signal)
                await self._process.wait()
        await self.kill()

    async def kill(self) -> None:
        """SIGKILL the server and its children, which lose what they had not written."""
        process, self._process = self._process, None
        with anyio.CancelScope(shield=True):
            if process is not None:
                if process.returncode is None:
                    await to_thread.run_sync(_kill_family, process.pid)
                with anyio.move_on_after(KILL_S):
                    await process.wait()
                    await process.aclose()
            if self._owner_fd is not None:
                await to_thread.run_sync(_forget, self.folder)
                os.close(self._owner_fd)
                self._owner_fd = None

    async def pause(self) -> None:
        """Freeze the server: connections are accepted by the kernel, and nothing answers."""
        if (pid := self.pid) is not None:
            await to_thread.run_sync(_freeze_family, pid)

    async def resume(self) -> None:
        if (pid := self.pid) is not None:
            await to_thread.run_sync(_thaw_family, pid)

    async def wait(self) -> int:
        """Wait for the server to end by itself, and return its exit code."""
        if self._process is None:
            raise StoreError(f"{self.name} in {self.folder} is not running")
        return await self._process.wait()

    async def _launch(self) -> None:
        for attempt in range(PORT_ATTEMPTS):
            if self._port_is_ours_to_choose:
                self._choose_ports()
            await self._prepare()
            self._process = await self._spawn()
            await to_thread.run_sync(_record, self.folder, self._process.pid)
            while self.is_running and not await self._is_ready(self._process.pid):  # noqa: ASYNC110
                await anyio.sleep(POLL_S)
            if self.is_running:
                # Clients hold the address from now on.
                self._port_is_ours_to_choose = False
                return
            tail = await to_thread.run_sync(_tail, self.log_path)
            port_was_taken = self._port_is_ours_to_choose and "ddress already in use" in tail
            if not port_was_taken or attempt == PORT_ATTEMPTS - 1:
                raise StoreError(f"{self.name} ended with {self._process.returncode} at its start:\n{tail}")

    def _choose_ports(self) -> None:
        self._port = free_port()

    async def _spawn_guarded(
        self, command: Sequence[str | Path], *, user: tuple[int, int] = (0, 0), pass_fds: Sequence[int] = ()
    ) -> anyio.abc.Process:
        log_fd = await to_thread.run_sync(_open_log, self.log_path)
        try:
            return await anyio.open_process(
                guarded(command, user=user),
                stdin=DEVNULL,
                stdout=log_fd,
                stderr=STDOUT,
                cwd=self.folder,
                env=environment(),
                # The terminal's Ctrl-C is for authd alone: it drains before its stores stop.
                start_new_session=True,
                pass_fds=pass_fds,
            )
        finally:
            os.close(log_fd)


def guarded(command: Sequence[str | Path], *, user: tuple[int, int] = (0, 0)) -> list[str]:
    """Return what runs `command` as `user` (uid and gid; 0 is whoever we are) and dies with this process."""
    uid, gid = user
    numbers = (os.getpid(), uid, gid, int(DEATH_SIGNAL))
    return [sys.executable, "-I", "-S", str(GUARD), *map(str, numbers), *map(str, command)]


def environment() -> dict[str, str]:
    # Messages in English ("Address already in use"), and no PGDATA or the like from the developer's shell.
    return {name: value for name, value in os.environ.items() if not name.startswith("PG")} | {"LC_ALL": "C"}


def free_port() -> int:
    """Return a port on which nothing listens, and which was not returned before, until all have been."""
    for number in itertools.islice(_given, len(PORTS)):
        port = PORTS[number % len(PORTS)]
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise StoreError(f"no free port on 127.0.0.1 from {PORTS.start} to {PORTS.stop}")


def listens(pid: int, port: int) -> bool:
    """Say if the port is this very process's: whoever took it first would answer for it just as well."""
    with suppress(psutil.NoSuchProcess):
        return any(
            connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
            for connection in psutil.Process(pid).net_connections("tcp")
        )
    return False


def _own(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    fd = os.open(folder / "owner.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise StoreError(f"another running process uses the store in {folder}") from None
    return fd


def _open_log(path: Path) -> int:
    with suppress(FileNotFoundError):
        path.replace(path.with_suffix(".log.previous"))
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


def _tail(path: Path) -> str:
    with suppress(FileNotFoundError):
        return path.read_text(errors="replace")[-LOG_TAIL_CHARS:].strip()
    return "(it wrote no log)"


def _record(folder: Path, pid: int) -> None:
    with suppress(psutil.NoSuchProcess):
        record = {"pid": pid, "started_at": psutil.Process(pid).create_time()}
        (folder / "server.json").write_text(json.dumps(record))


def _forget(folder: Path) -> None:
    (folder / "server.json").unlink(missing_ok=True)


def _end_leftover(folder: Path) -> None:
    try:
        record = json.loads((folder / "server.json").read_text())
        process = psutil.Process(record["pid"])
    except (FileNotFoundError, ValueError, psutil.NoSuchProcess):
        return
    if abs(process.create_time() - record["started_at"]) < SAME_START_S:
        _kill_family(process.pid)


def _family(pid: int) -> list[psutil.Process]:
    """The process and what it forked. A signal to the group would miss Postgres' children: each leads a group."""
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    return []


def _freeze_family(pid: int) -> None:
    # The parent first, so that it forks no more.
    with suppress(psutil.NoSuchProcess):
        psutil.Process(pid).suspend()
    for process in _family(pid):
        with suppress(psutil.NoSuchProcess):
            process.suspend()


def _thaw_family(pid: int) -> None:
    for process in reversed(_family(pid)):
        with suppress(psutil.NoSuchProcess):
            process.resume()


def _kill_family(pid: int) -> None:
    _freeze_family(pid)
    family = _family(pid)
    for process in family:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    # A zombie holds no port, no memory and no file, and a container's first process may never collect it.
    deadline = time.monotonic() + KILL_S
    while any(is_alive(process) for process in family) and time.monotonic() < deadline:
        time.sleep(POLL_S)


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
