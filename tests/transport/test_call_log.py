"""What is logged of calls, and how lines are written."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Iterator
from typing import Any

import asyncpg
import pytest
import structlog
from structlog.testing import capture_logs

from apikeys.v1 import key_service_pb2 as pb
from latchgate.observability import configure_logging
from support.service import RunningService, bearer, refusal
from support.transport import (
    MANAGEMENT_METHODS,
    Http2,
    call,
    call_raw,
    eventually,
    good_request,
    label_of,
    path_of,
    sample,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

SOME_KEY = "key_" + "0" * 26
FIELDS = {"event", "log_level", "method", "code", "duration_ms", "peer", "request_id", "caller", "organization"}
TOKEN = "lk_" + "Ab1" * 13 + "Z"


@pytest.fixture
def as_configured() -> Iterator[None]:
    """Puts logging back to what it was, after a test that configures it."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.parametrize("method", MANAGEMENT_METHODS)
async def test_management_call_is_one_line(shared_service: RunningService, method: str) -> None:
    """Every management call, answered or refused, is one line: the method, how it ended, how long it took, from where,
    and by whom.
    """
    created = await shared_service.create_key("acme", permissions=["keys:read", "keys:write", "read"])
    if method == "GetPublishableKey":
        await shared_service.create_key("acme", key_type=2)
    with capture_logs() as lines:
        await call(shared_service, method, good_request(method, key_id=created.key.id))

    (line,) = lines
    assert FIELDS == line.keys()
    assert ("call", "info", label_of(method), "OK", "127.0.0.1", "org_root") == (
        line["event"],
        line["log_level"],
        line["method"],
        line["code"],
        line["peer"],
        line["organization"],
    )
    assert line["caller"].startswith("key_")
    assert line["duration_ms"] > 0


async def test_caller_is_named(shared_service: RunningService) -> None:
    """The line names the key that called, and its organization, not those that the call was about."""
    caller = await shared_service.create_key("acme", permissions=["keys:read"])
    with capture_logs() as lines:
        await call(shared_service, "ListKeys", pb.ListKeysRequest(), metadata=bearer(caller.token))

    assert [(caller.key.id, "acme")] == [(line["caller"], line["organization"]) for line in lines]


async def test_refusal_names_its_reason(shared_service: RunningService) -> None:
    """The line of a refused call has the reason that the caller was told; an unknown caller stays nameless."""
    limited = await shared_service.create_key("acme", permissions=["read"])
    with capture_logs() as lines:
        await refusal(call(shared_service, "GetKey", pb.GetKeyRequest(key_id=SOME_KEY)))
        await refusal(call(shared_service, "GetKey", pb.GetKeyRequest(key_id="no key")))
        await refusal(call(shared_service, "GetKey", pb.GetKeyRequest(key_id=SOME_KEY), metadata=()))
        await refusal(call(shared_service, "GetKey", pb.GetKeyRequest(), metadata=bearer("a-token-of-nobody")))
        await refusal(call(shared_service, "GetKey", pb.GetKeyRequest(key_id=SOME_KEY), metadata=bearer(limited.token)))

    told = [(line["code"], line["reason"], line["organization"]) for line in lines]
    assert [
        ("NOT_FOUND", "KEY_NOT_FOUND", "org_root"),
        ("INVALID_ARGUMENT", "INVALID_FIELD", "org_root"),
        ("UNAUTHENTICATED", "CREDENTIALS_MISSING", None),
        ("UNAUTHENTICATED", "CREDENTIALS_INVALID", None),
        ("PERMISSION_DENIED", "PERMISSION_MISSING", "acme"),
    ] == told
    assert {"info"} == {line["log_level"] for line in lines}


async def test_validation_is_not_logged(shared_service: RunningService) -> None:
    """No answer of the hot path is logged, whatever the outcome, and neither is a bad request: a log that clients can
    fill is a way to fill the disk.
    """
    token = (await shared_service.create_key("acme")).token
    with capture_logs() as lines:
        assert "VALID" == await shared_service.outcome(token)
        assert "NOT_FOUND" == await shared_service.outcome("no token")
        assert "PERMISSION_DENIED" == await shared_service.outcome(token, required_permissions=["write"])
        await refusal(shared_service.keys.Validate(pb.ValidateRequest(min_revision=-1)))
        await refusal(call_raw(shared_service.channel, "Validate", b"\xff"))
        await call(shared_service, "BatchValidate", good_request("BatchValidate", key_id="", token=token))

    assert [] == lines


async def test_cancelled_call_is_logged(shared_service: RunningService) -> None:
    """A management call that its caller gives up, here while it waits for a lock, is a line too."""
    created = await shared_service.create_key("acme")
    connection = await asyncpg.connect(shared_service.database_url)
    with capture_logs() as lines:
        async with connection.transaction():
            await connection.execute("SELECT 1 FROM organization WHERE id = 'acme' FOR UPDATE")
            raw = good_request("UpdateKey", key_id=created.key.id).SerializeToString()
            started = call_raw(shared_service.channel, "UpdateKey", raw, metadata=shared_service.root)
            await eventually(lambda: sample(shared_service, "latchgate_pool_connections", state="busy") > 0)
            started.cancel()
            await eventually(lambda: bool(lines))
    await connection.close()

    assert [("CANCELLED", "org_root")] == [(line["code"], line["organization"]) for line in lines]


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
@pytest.mark.usefixtures("as_configured")
async def test_level_is_kept(capsys: pytest.CaptureFixture[str], level: str) -> None:
    """Lines below the level that is set are not written; all others are, each with its own level."""
    configure_logging(level=level, as_json=True)
    log = structlog.get_logger("latchgate.test")
    levels = ["debug", "info", "warning", "error"]
    for each in levels:
        getattr(log, each)("happened")

    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert levels[levels.index(level) :] == [line["level"] for line in lines]


@pytest.mark.usefixtures("as_configured")
async def test_json_lines_are_whole(capsys: pytest.CaptureFixture[str]) -> None:
    """In JSON each line is one object, whatever stands in it: no text can end a line early or begin another."""
    configure_logging(level="info", as_json=True)
    nasty: dict[str, Any] = {
        "lines": 'a\nb\r\n{"level": "error"}',
        "controls": "\0\x1b[31m\x7f\u2028\u0085",
        "surrogate": "\ud800",
        "bytes": b"\xff",
        "object": object(),
        "nested": {"a": ["b\nc", {"d": 1.5}]},
    }
    structlog.get_logger("latchgate.test").info("happened", **nasty)
    logging.getLogger("a library").error("first line\nsecond line")

    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert ["happened", "first line"] == [line["event"] for line in lines]
    assert nasty["lines"] == lines[0]["lines"]


@pytest.mark.parametrize("as_json", [True, False], ids=["json", "console"])
@pytest.mark.usefixtures("as_configured")
async def test_lines_of_libraries(capsys: pytest.CaptureFixture[str], *, as_json: bool) -> None:
    """Lines of libraries are written like our own: at warning and above, without a traceback, and without what they
    were filled with, which may be what a client sent or what a row holds.
    """
    configure_logging(level="debug", as_json=as_json)
    for name in ("asyncpg", "grpc._cython.cygrpc", "asyncio", "alembic"):
        library = logging.getLogger(name)
        library.info("not written: %s", "secret-value")
        library.warning("Something of %s", "secret-value")
        try:
            int("secret-value")
        except ValueError:
            library.exception("Invalid encoding on %s\nmore: secret-value", b"secret-value", stack_info=True)

        library.error("Arguments that do not fit: %d", "secret-value")

    written = capsys.readouterr().err
    assert "secret-value" not in written
    assert "Traceback" not in written
    assert "Stack (" not in written
    lines = written.splitlines()
    assert 12 == len(lines)
    for line in lines[1::3]:
        assert "Invalid encoding on %s" in line
        assert "ValueError" in line
    if as_json:
        assert ["asyncpg", "grpc._cython.cygrpc", "asyncio", "alembic"] == [
            json.loads(line)["logger"] for line in lines[::3]
        ]


@pytest.mark.parametrize("as_json", [True, False], ids=["json", "console"])
@pytest.mark.usefixtures("as_configured")
async def test_secrets_are_blotted_out(capsys: pytest.CaptureFixture[str], *, as_json: bool) -> None:
    """Should a token, a header or an address of a database ever get into a line, it is not written."""
    configure_logging(level="info", as_json=as_json)
    log = structlog.get_logger("latchgate.test")
    event = f"with {TOKEN}"
    log.info(event, token=TOKEN, nested={"a": [f"x{TOKEN}y"]}, tail=f"{TOKEN}0")
    log.info("h", header="Bearer some-secret", other="BEARER some-secret", dsn="postgresql://u:some-secret@host/db")

    written = capsys.readouterr().err
    assert TOKEN.removeprefix("lk_") not in written
    assert "some-secret" not in written
    assert 7 == written.count("[redacted]")


@pytest.mark.usefixtures("as_configured")
async def test_log_that_can_not_be_written_fails_no_call(
    shared_service: RunningService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk or a closed pipe behind the log is no reason to refuse a call, or to leave a change half told."""
    # Unbuffered, so that nothing is left to be written when it is closed.
    with io.TextIOWrapper(io.FileIO("/dev/full", "w"), write_through=True) as always_full:
        monkeypatch.setattr(sys, "stderr", always_full)
        configure_logging(level="info", as_json=True)
        with pytest.raises(OSError, match="No space left"):
            always_full.write("anything")
        created = await shared_service.create_key("acme")
        logging.getLogger("a library").error("happened")
    assert "VALID" == await shared_service.outcome(created.token)


@pytest.mark.usefixtures("as_configured")
async def test_header_that_is_not_text_is_not_logged(
    shared_service: RunningService, capsys: pytest.CaptureFixture[str]
) -> None:
    """The library logs headers that are not UTF-8, for every call that has one. What is written does not hold them: it
    would be a token that was sent with a byte too many.
    """
    configure_logging(level="debug", as_json=True)
    port = int(shared_service.address.rpartition(":")[2])
    async with Http2.connected(port) as connection:
        for name in (b"authorization", b"x-api-key", b"x-anything"):
            stream = await connection.start_call(path_of("ListPlans"), b"", [(name, TOKEN.encode() + b"\xff")])
            await connection.frame(Http2.HEADERS, stream)
    written: list[str] = []

    def all_are_logged() -> bool:
        written.extend(capsys.readouterr().err.splitlines())
        return 3 == sum('"code": "UNAUTHENTICATED"' in line for line in written)

    await eventually(all_are_logged)
    assert any("Invalid encoding" in line for line in written)
    assert TOKEN.removeprefix("lk_") not in "".join(written)
    assert all(json.loads(line) for line in written)
