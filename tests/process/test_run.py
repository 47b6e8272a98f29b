"""`latchgate run`: what a newcomer sees, copies and stops."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from apikeys.v1 import organization_service_pb2 as organizations_pb
from latchgate import demo
from latchgate.config import Settings
from latchgate.observability import configure_logging
from support.databases import connected, until
from support.processes import (
    environment,
    is_running,
    latchgate,
    postmaster,
    run_latchgate,
    until_gone,
)
from support.service import ROOT_TOKEN, RunningService, make_settings

RUN = {"LISTEN": "127.0.0.1:0", "METRICS_LISTEN": "127.0.0.1:0", "WORKERS": "2"}
LIFE = [
    ("CreateKey", "VALID"),
    ("ToggleKey   off", "INACTIVE"),
    ("ToggleKey   on", "VALID"),
    ("RotateKey", "VALID"),
    ("and the old one", "REVOKED"),
    ("RevokeKey", "REVOKED"),
]
END = "Press Ctrl-C to stop."


def assert_life(lines: list[str]) -> None:
    """Demands that a key's life was shown, step by step, with what Validate said after each."""
    start = next(number for number, line in enumerate(lines) if line.startswith("A key of organization demo"))
    for (step, outcome), line in zip(LIFE, lines[start + 1 :], strict=False):
        assert line.strip().startswith(step), lines
        assert re.search(rf"   {outcome} +[0-9.]+ ms$", line), lines
    assert "" == lines[start + 1 + len(LIFE)]


def printed_command(lines: list[str], first: str, last: str) -> str:
    """Gives what stands between two lines, as it stands."""
    start = next(number for number, line in enumerate(lines) if line.startswith(first))
    end = next(number for number, line in enumerate(lines) if number > start and line.startswith(last))
    return "\n".join(lines[start + 1 : end])


async def execute(command: str, folder: Path, **variables: str) -> dict[str, object]:
    """Has a shell execute a command, and gives the JSON that it prints."""
    shell = shutil.which("bash")
    assert shell is not None
    process = await asyncio.create_subprocess_exec(
        shell,
        "-c",
        command,
        cwd=folder,
        env=os.environ | variables,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert (0, b"") == (process.returncode, err), command
    answer: dict[str, object] = json.loads(out)
    return answer


async def create_as_printed(lines: list[str], folder: Path, **variables: str) -> str:
    """Creates a key by the line that was printed for it, and gives its token."""
    command = printed_command(lines, "Try it from another terminal", "Then ask")
    token = (await execute(command, folder, **variables))["token"]
    assert isinstance(token, str)
    return token


async def outcome_as_printed(lines: list[str], folder: Path, token: str) -> object:
    """Asks about a token by the line that was printed for it."""
    command = printed_command(lines, "Then ask", END)
    return (await execute(command.replace("lk_...", token), folder))["outcome"]


async def test_first_steps(folder: Path) -> None:
    """In an empty folder `run` makes a database and shows a key's life; its lines work as printed; Ctrl-C ends it all.

    The next run finds what was there before, and a second one beside it is told that the data is in use.
    """
    data = folder / ".latchgate"
    async with latchgate("run", folder, environment(**RUN)) as process:
        await process.line(re.escape(END))
        assert process.out[0].startswith("Making a PostgreSQL in .latchgate")
        assert "Data: PostgreSQL in .latchgate, new." in process.out
        assert_life(process.out)
        assert 0o600 == stat.S_IMODE((data / "root-token").stat().st_mode)
        token = await create_as_printed(process.out, folder)
        assert "OUTCOME_VALID" == await outcome_as_printed(process.out, folder, token)

        status, out, err = await run_latchgate("run", folder, environment(**RUN))
        assert (1, [], 1) == (status, out, len(err))
        assert "another latchgate is running on .latchgate" in err[0]
        assert "OUTCOME_VALID" == await outcome_as_printed(process.out, folder, token)

        database = postmaster(data)
        process.tell_group(signal.SIGINT)
        assert 0 == await process.ended()
        assert not is_running(database)
        assert "Stopping ..." == process.out[-1]
        assert [] == process.err
        assert not re.search("lk_[0-9A-Za-z]{40}", process.text)

    async with latchgate("run", folder, environment(**RUN)) as process:
        await process.line(re.escape(END))
        assert "Data: PostgreSQL in .latchgate, with all that was there before." in process.out
        assert_life(process.out)
        assert "OUTCOME_VALID" == await outcome_as_printed(process.out, folder, token)
        process.tell(signal.SIGTERM)
        assert 0 == await process.ended()
        assert [] == process.err


async def test_with_database(empty_database_url: str, tmp_path: Path) -> None:
    """With a database of one's own `run` starts no PostgreSQL, and does not print the address of the database.

    The folder where it keeps the root token may have any name: the printed line bears it.
    """
    data = tmp_path / "my data; $HOME"
    async with latchgate(
        "run", tmp_path, environment(**RUN, DATABASE_URL=empty_database_url, DATA_DIR=data.name)
    ) as process:
        await process.line(re.escape(END))
        assert "Data: the database of LATCHGATE_DATABASE_URL, new." in process.out
        assert_life(process.out)
        token = await create_as_printed(process.out, tmp_path)
        assert "OUTCOME_VALID" == await outcome_as_printed(process.out, tmp_path, token)
        process.tell(signal.SIGINT)
        assert 0 == await process.ended()
        assert [] == process.err
        assert empty_database_url not in process.text
    assert [data / "root-token"] == list(data.iterdir())


def test_folder_with_spaces(ending: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    """A folder whose name the embedded PostgreSQL can not bear is told in one line before anything is made there."""
    status, _, err = ending("run", DATABASE_URL=None, DATA_DIR="my data")
    assert (2, 1) == (status, err.count("\n"))
    assert "LATCHGATE_DATA_DIR" in err
    assert not (tmp_path / "my data" / "postgres").exists()


async def test_interrupted_first_start(folder: Path) -> None:
    """Ctrl-C while the database is being made ends all of it without complaint, and the next start makes it anew."""
    data = folder / ".latchgate"
    async with latchgate("run", folder, environment(**RUN)) as process:
        await process.line("Making a PostgreSQL")

        async def is_begun() -> bool:
            return await asyncio.to_thread((data / "postgres" / "global" / "pg_control").exists)

        await until(is_begun)
        process.tell_group(signal.SIGINT)
        assert 0 == await process.ended()
        assert [] == process.err
    assert not (data / "postgres" / "postmaster.pid").exists()
    status, out, err = await run_latchgate("migrate", folder, environment(**RUN))
    assert (0, []) == (status, err)
    assert out[0].startswith("schema ")


async def test_killed_and_started_again(folder: Path) -> None:
    """After the process is killed the next one takes over its PostgreSQL and its data.

    Who can not wait and presses Ctrl-C twice ends both, the process at once.
    """
    data = folder / ".latchgate"
    async with latchgate("run", folder, environment(**RUN)) as process:
        await process.line(re.escape(END))
        token = await create_as_printed(process.out, folder)
        database = postmaster(data)
        process.tell(signal.SIGKILL)
        assert -signal.SIGKILL == await process.ended()
    assert is_running(database)
    async with latchgate("run", folder, environment(**RUN)) as process:
        await process.line(re.escape(END))
        assert database == postmaster(data)
        assert "OUTCOME_VALID" == await outcome_as_printed(process.out, folder, token)
        process.tell(signal.SIGINT)
        await process.line("Stopping")
        process.tell(signal.SIGINT)
        # It is 0 if all was done before the second signal came.
        assert await process.ended() in {0, 1}
    await until_gone(database)


@pytest.fixture
def quiet(undone: None) -> None:
    """Has a service in this process log what `run` logs."""
    del undone
    configure_logging(level="warning", as_json=False)


async def show_life(service: RunningService, capsys: pytest.CaptureFixture[str]) -> tuple[list[str], str]:
    """Has a key's life shown, and gives the lines, and the complaint if there is one."""
    await demo.show(make_settings(service.database_url), service.running, is_new=False)
    captured = capsys.readouterr()
    return captured.out.splitlines(), captured.err


async def limit_keys(service: RunningService, count: int) -> None:
    """Sets how many keys an organization of the plan `default` may have."""
    plan = organizations_pb.Plan(id="default", max_keys=count)
    request = organizations_pb.UpdatePlanRequest(plan=plan)
    request.update_mask.paths.append("max_keys")
    await service.organizations.UpdatePlan(request, metadata=service.root)


@pytest.mark.usefixtures("quiet")
async def test_life_leaves_no_key(service: RunningService, capsys: pytest.CaptureFixture[str]) -> None:
    """A key's life can be shown for ever: it takes no place of the plan's for good, also when it breaks off."""
    await limit_keys(service, 1)
    async with connected(service.database_url) as connection:
        await connection.execute(
            "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RAISE EXCEPTION 'broken'; END$$"
        )
        await connection.execute(
            "CREATE TRIGGER broken_toggle BEFORE UPDATE ON key FOR EACH ROW"
            " WHEN (NEW.active IS DISTINCT FROM OLD.active) EXECUTE FUNCTION fail()"
        )
        lines, complaint = await show_life(service, capsys)
        assert "can not be shown to its end" in complaint
        assert END == lines[-1]
        await connection.execute("DROP TRIGGER broken_toggle ON key")
    for _ in range(2):
        lines, complaint = await show_life(service, capsys)
        assert_life(lines)
        assert "" == complaint


@pytest.mark.usefixtures("quiet")
async def test_no_place_for_a_key(service: RunningService, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the organization has all keys that it may have, `run` says so, says what to do, and serves."""
    await show_life(service, capsys)
    await limit_keys(service, 1)
    created = await service.create_key(demo.ORGANIZATION)
    lines, complaint = await show_life(service, capsys)
    assert "can not be shown" in complaint
    assert "revoke keys" in complaint
    assert END == lines[-1]
    assert "VALID" == await service.outcome(created.token)


@pytest.mark.usefixtures("quiet")
async def test_behind_tls(service: RunningService, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Where the port speaks TLS, `run` says why no key's life is shown."""
    tls = {"tls_cert": tmp_path / "cert.pem", "tls_key": tmp_path / "key.pem"}
    settings: Settings = make_settings(service.database_url, **tls)
    await demo.show(settings, service.running, is_new=True)
    captured = capsys.readouterr()
    assert "TLS" in captured.out
    assert "" == captured.err


@pytest.mark.usefixtures("quiet")
async def test_own_root_token(
    service: RunningService, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a root token of one's own the printed line takes it from the variable, and does not show it."""
    monkeypatch.setenv("LATCHGATE_ROOT_TOKEN", ROOT_TOKEN)
    lines, _ = await show_life(service, capsys)
    assert ROOT_TOKEN not in "".join(lines)
    token = await create_as_printed(lines, await asyncio.to_thread(Path.cwd))
    assert "VALID" == await service.outcome(token)


def test_which_grpcurl_is_printed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The printed lines name a grpcurl that every terminal finds, else the one beside this Python."""
    folder = Path(sys.executable).parent
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert str(folder / "grpcurl") == demo.grpcurl()
    monkeypatch.setenv("PATH", str(folder))
    assert str(folder / "grpcurl") == demo.grpcurl()
    monkeypatch.chdir(folder.parent)
    assert "bin/grpcurl" == demo.grpcurl()
    (tmp_path / "grpcurl").write_text("")
    (tmp_path / "grpcurl").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "grpcurl" == demo.grpcurl()
