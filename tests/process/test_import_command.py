"""`latchgate import`: what it says, what it ends with, and that nothing stops it but what should."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import sys
import termios
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme

from apikeys.v1 import organization_service_pb2 as organizations_pb
from apikeys.v1.organization_service_pb2_grpc import OrganizationServiceStub
from latchgate.config import CommandError
from latchgate.importing.command import ImportOrder, run
from latchgate.importing.files import KeyFile
from support.databases import connected, until
from support.faults import faulty_wire
from support.fleets import fleet
from support.imports import foreign_token, sha256
from support.keys import make_plan
from support.processes import children, environment, run_latchgate
from support.service import ROOT_TOKEN, RunningService, bearer, run_service

Ending = Callable[..., tuple[int, str, str]]


def write(folder: Path, tokens: Sequence[str], name: str = "keys.csv") -> Path:
    """Writes a file of keys as a spreadsheet does."""
    lines = ["digest,hint,name,permissions"]
    lines += [f'{sha256(token).hex()},{token[:12]},"key, {number}",read' for number, token in enumerate(tokens)]
    path = folder / name
    path.write_bytes("\ufeff".encode() + "\r\n".join([*lines, ""]).encode())
    return path


def results(folder: Path) -> list[dict[str, Any]]:
    """Reads the file of results, as far as it is written."""
    path = folder / "results.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


async def key_count(url: str) -> int:
    """Reads how many keys the organization has."""
    async with connected(url) as connection:
        count: int = await connection.fetchval("SELECT count(*) FROM key WHERE organization_id = 'acme'")
        counted: int = await connection.fetchval("SELECT key_count FROM organization WHERE id = 'acme'")
    assert count == counted
    return count


@pytest.fixture
async def large(service: RunningService) -> RunningService:
    """A service whose organization `acme` may have as many keys as a test makes."""
    await service.create_organization("acme", await make_plan(service, max_keys=100_000))
    return service


async def imported(file: Path, address: str, **options: Any) -> int:
    """Runs the command within this process, as root, for the organization `acme`; gives its exit status."""
    values: dict[str, Any] = {
        "organization": "acme",
        "token": ROOT_TOKEN,
        "tls_ca": None,
        "tls_cert": None,
        "tls_key": None,
        "is_plaintext_allowed": False,
        "results": None,
    }
    order = ImportOrder(file=file, address=address, **(values | options))
    # On a thread of its own: the service runs on this one.
    return await asyncio.to_thread(lambda: asyncio.run(run(order)))


async def test_file_is_imported(large: RunningService, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file is imported, and imported again with nothing to do: status 0, one line that counts, and with --results a
    line for each row.
    """
    tokens = [foreign_token() for _ in range(1203)]
    file = write(tmp_path, tokens)
    command = f"import {file} --address {large.address} --organization acme --results results.jsonl"

    status, out, err = await run_latchgate(command, tmp_path, environment(TOKEN=ROOT_TOKEN))

    assert (0, []) == (status, err)
    assert ["1203 rows: 1203 imported, 0 there already, 0 refused"] == [line.partition(", in ")[0] for line in out]
    written = results(tmp_path)
    assert [(line + 2, "CREATED") for line in range(1203)] == [(each["line"], each["outcome"]) for each in written]
    assert "VALID" == await large.outcome(tokens[-1], required_permissions=["read"])
    assert written[-1]["key_id"] == (await large.validate(tokens[-1])).key_id
    assert 1203 == await key_count(large.database_url)

    capsys.readouterr()
    assert 0 == await imported(file, large.address, results=tmp_path / "results.jsonl")

    assert "1203 rows: 0 imported, 1203 there already, 0 refused" in capsys.readouterr().out
    assert [each["key_id"] for each in written] == [each["key_id"] for each in results(tmp_path)]


async def test_refused_rows(large: RunningService, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With rows that are refused the status is 1, and each reason is told once, with the lines; the others are
    imported.
    """
    await large.create_organization("rival")
    taken, other = foreign_token(), foreign_token()
    good = {"digest": sha256(foreign_token()).hex(), "name": "good"}
    lines = [
        good,
        good,
        good | {"name": "another name"},
        {"digest": "x", "name": "a"},
        {"digest": sha256(other).hex(), "name": "a", "permissions": ["no:such"]},
        {"digest": "y", "name": "a"},
        {"digest": sha256(taken).hex(), "name": "a"},
    ]
    (tmp_path / "theirs.csv").write_text(f"digest,name\n{sha256(taken).hex()},theirs\n")
    (tmp_path / "keys.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert 0 == await imported(tmp_path / "theirs.csv", large.address, organization="rival")
    capsys.readouterr()

    assert 1 == await imported(tmp_path / "keys.jsonl", large.address, results=tmp_path / "results.jsonl")

    out = capsys.readouterr().out
    said = [line for line in out.splitlines() if line.startswith(("7 rows", " "))]
    assert "7 rows: 1 imported, 1 there already, 5 refused" == said[0].partition(", in ")[0]
    told = dict(zip((line.strip() for line in said[1::2]), (line.strip() for line in said[2::2]), strict=True))
    assert {
        "digest: must be the SHA-256 of the token, as 64 hexadecimal digits or in base64": "lines 4, 6",
        "there already, but with another name": "line 3",
        "permissions[0]: must match a scope of the organization's catalogue; see ListScopes": "line 5",
        "digest: is that of another organization's key": "line 7",
    } == told
    assert ["CREATED", "DUPLICATE", "DUPLICATE", "INVALID", "INVALID", "INVALID", "DUPLICATE"] == [
        each["outcome"] for each in results(tmp_path)
    ]


def test_tokens_are_refused(ending: Ending, tmp_path: Path) -> None:
    """A file of tokens in plain text is refused loudly with status 2, before anything is sent, and none is repeated."""
    token = foreign_token()
    (tmp_path / "keys.csv").write_text(f"name,token\na,{token}\n")
    status, out, err = ending("import", "keys.csv", "--address", "127.0.0.1:1", TOKEN=ROOT_TOKEN)
    assert (2, "", 1) == (status, out, err.count("\n"))
    assert "latchgate: keys.csv: line 1 has a column 'token'. Tokens in plain text are not imported" in err
    assert token not in err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("import keys.csv", "LATCHGATE_TOKEN is not set"),
        ("import keys.txt", "must end in .csv or .jsonl"),
        ("import none.csv", "No such file"),
        ("import keys.csv --address gate.example.com:50051", "is not this machine: give --tls-ca"),
        ("import keys.csv --tls-cert cert.pem", "need --tls-ca"),
        ("import keys.csv --tls-ca keys.csv --tls-cert keys.csv", "belong together"),
        ("import keys.csv --tls-ca none.pem", "none.pem: No such file"),
        ("import keys.csv --results none/results.jsonl", "none/results.jsonl: No such file"),
        ("import", "FILE"),
        ("import keys.csv --token abc", "--token"),
    ],
)
def test_wrong_usage(ending: Ending, tmp_path: Path, line: str, said: str) -> None:
    """What can not be done as it is asked for is told on standard error, with status 2, before anything is sent."""
    write(tmp_path, [foreign_token()])
    status, out, err = ending(*line.split(), TOKEN=None if "TOKEN" in said else ROOT_TOKEN)
    assert (2, "") == (status, out)
    assert said in err
    assert ROOT_TOKEN not in err


async def test_service_refuses(large: RunningService, tmp_path: Path) -> None:
    """A caller that is not known, or an organization that is not there, ends the command with status 1 and one line."""
    file = write(tmp_path, [foreign_token()])
    for token, organization, said in (("x" * 40, "acme", "UNAUTHENTICATED"), (ROOT_TOKEN, "none", "NOT_FOUND")):
        with pytest.raises(CommandError, match=said) as caught:
            await imported(file, large.address, token=token, organization=organization)
        assert 1 == caught.value.status
        assert token not in str(caught.value)


async def test_file_that_changes(large: RunningService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that has other rows when they are sent than when they were counted is no success: a pipe is read once."""
    file = write(tmp_path, [foreign_token(), foreign_token()])
    monkeypatch.setattr(KeyFile, "count", lambda _: 3)
    with pytest.raises(CommandError, match="3 rows were counted and 2 read"):
        await imported(file, large.address)


async def test_bar_on_a_terminal(large: RunningService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal a bar shows how many of the rows are done."""
    file = write(tmp_path, [foreign_token() for _ in range(700)])
    terminal, end = pty.openpty()
    termios.tcsetwinsize(end, (24, 120))
    with os.fdopen(end, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        assert 0 == await imported(file, large.address)
        monkeypatch.undo()
    shown = b""
    # The end of a terminal that was closed is an error.
    with suppress(OSError):
        while some := os.read(terminal, 65536):
            shown += some
    os.close(terminal)
    assert b"700/700" in shown


async def test_by_tls(database_url: str, tmp_path: Path) -> None:
    """With --tls-ca the service is reached by TLS, also with a certificate of the client's own."""
    authority = trustme.CA()
    served, own = authority.issue_cert("127.0.0.1"), authority.issue_cert("importer")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    for name, issued in (("served", served), ("own", own)):
        issued.cert_chain_pems[0].write_to_path(tmp_path / f"{name}.pem")
        issued.private_key_pem.write_to_path(tmp_path / f"{name}-key.pem")
    files = {"tls_cert": "served.pem", "tls_key": "served-key.pem", "tls_client_ca": "ca.pem"}
    paths: dict[str, Any] = {name: tmp_path / file for name, file in files.items()}
    async with run_service(database_url) as plain:
        await plain.create_organization("acme")
    client = {"tls_ca": tmp_path / "ca.pem", "tls_cert": tmp_path / "own.pem", "tls_key": tmp_path / "own-key.pem"}
    async with run_service(database_url, **paths) as service:
        assert 0 == await imported(write(tmp_path, [foreign_token()]), service.address, **client)


async def test_database_away_in_the_middle(
    postgres_url: str, database_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """While the database is away the command waits and tries again; when it is back it goes on, and every row is there
    once.
    """
    async with faulty_wire(postgres_url) as wire:
        await wire.listen()
        async with run_service(wire.url(database_url)) as service:
            await service.create_organization("acme", await make_plan(service, max_keys=100_000))
            file = write(tmp_path, [foreign_token() for _ in range(3000)])
            wire.delay_s = 0.01
            importing = asyncio.create_task(imported(file, service.address, results=tmp_path / "results.jsonl"))
            await _until_some(tmp_path, 500)
            wire.refuse()
            said = ""

            async def is_said() -> bool:
                nonlocal said
                said += capsys.readouterr().err
                return "trying again in" in said

            await until(is_said)
            assert "UNAVAILABLE" in said
            wire.delay_s = 0.0
            await wire.listen()
            assert 0 == await importing
    assert 3000 == await key_count(database_url) == len({each["line"] for each in results(tmp_path)})


async def _until_some(folder: Path, count: int) -> None:
    async def are_there() -> bool:
        return len(results(folder)) >= count

    await until(are_there)


async def test_worker_killed_in_the_middle(database_url: str, tmp_path: Path) -> None:
    """When the worker that it speaks to is killed the command goes on at its successor: every row is there once."""
    async with fleet(database_url, tmp_path, WORKERS=1, LEASE_SECONDS=1) as service:
        async with grpc.aio.insecure_channel(service.address) as channel:
            stub: Any = OrganizationServiceStub(channel)
            root = bearer(ROOT_TOKEN)
            plan = organizations_pb.Plan(id="large", max_keys=100_000)
            await stub.CreatePlan(organizations_pb.CreatePlanRequest(plan=plan), metadata=root)
            await stub.CreateOrganization(
                organizations_pb.CreateOrganizationRequest(organization_id="acme", name="Acme", plan_id="large"),
                metadata=root,
            )
        file = write(tmp_path, [foreign_token() for _ in range(4000)])
        importing = asyncio.create_task(imported(file, service.address, results=tmp_path / "results.jsonl"))
        await _until_some(tmp_path, 500)
        for pid in children(service.process.pid):
            os.kill(pid, signal.SIGKILL)
        assert not importing.done()
        assert 0 == await importing
    assert 4000 == await key_count(database_url) == len({each["line"] for each in results(tmp_path)})
