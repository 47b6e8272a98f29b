"""A setting that is wrong ends the command with one line that names it, and that shows no secret."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trustme

from latchgate.config import unknown_variables
from support.processes import environment, run_latchgate

SECRET = "hunter2-hunter2-hunter2"

Failing = Callable[..., tuple[int, str]]


@pytest.fixture
def failing(ending: Callable[..., tuple[int, str, str]]) -> Failing:
    """Runs `latchgate serve` with settings that it ends for; gives its status and its complaint."""

    def run(**variables: str | None) -> tuple[int, str]:
        status, out, complaint = ending("serve", **variables)
        assert "" == out
        return status, complaint

    return run


def assert_one_line(complaint: str, *names: str) -> None:
    """Demands one line of latchgate's own that names what is wrong, and no secret."""
    assert complaint.startswith("latchgate: "), complaint
    assert 1 == complaint.count("\n"), complaint
    for name in names:
        assert name in complaint
    assert SECRET not in complaint


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DATABASE_URL", f"mysql://user:{SECRET}@host/name"),
        ("DATABASE_URL", f"{SECRET}"),
        ("DATABASE_URL", f"postgresql://user:{SECRET}@host:port/name"),
        ("DATABASE_URL", f"postgresql://user:{SECRET}@host:0/name"),
        ("DATABASE_URL", f"postgresql://user:{SECRET}@host:65536/name"),
        ("DATABASE_URL", f"postgresql://user:{SECRET}@one:5432,two:x/name"),
        ("DATABASE_URL", f"postgresql://user:{SECRET}@[::1/name"),
        ("DATABASE_URL", f"postgresql://user:{SECRET}@{SECRET}@host/name"),
        ("DATABASE_URL", f"postgresql://user:{SECRET}/{SECRET}@host/name"),
        ("DATABASE_URL", f"postgresql://user:{SECRET}#{SECRET}@host/name"),
        ("DATABASE_URL", f"postgresql://user:{SECRET}?{SECRET}@host/name"),
        ("DATABASE_URL", f"postgresql://user:{SECRET}@host/name?{SECRET}"),
        ("DATABASE_URL", f"postgresql://user:{SECRET}@host/name?port=x"),
        ("DATABASE_URL", f"postgresql://user:{SECRET}@host/name?sslmode=always"),
        ("DATABASE_URL", f"postgresql://user:{SECRET}@host/name?sslmode=verify-full&sslrootcert=no-such-file"),
        ("TAG_KEY", SECRET),
        ("TAG_KEY", SECRET * 30),
        ("ROOT_TOKEN", SECRET),
        ("ROOT_TOKEN", SECRET * 30),
        ("LISTEN", "50051"),
        ("LISTEN", "localhost"),
        ("LISTEN", ":50051"),
        ("LISTEN", "localhost:"),
        ("LISTEN", "localhost:65536"),
        ("LISTEN", "localhost:-1"),
        ("LISTEN", "localhost:\u0661"),
        ("LISTEN", "localhost:" + "1" * 5000),
        ("LISTEN", "0.0.0.0:0"),
        ("LISTEN", "[::]:0"),
        ("HTTP_LISTEN", "8081"),
        ("HTTP_LISTEN", "0.0.0.0:0"),
        ("TRUSTED_HOPS", "-1"),
        ("TRUSTED_HOPS", "some"),
        ("METRICS_LISTEN", "9464"),
        ("METRICS_LISTEN", "localhost:http"),
        ("TLS_CERT", "cert.pem"),
        ("TLS_KEY", "key.pem"),
        ("TLS_CLIENT_CA", "ca.pem"),
        ("SCOPES_FILE", "no-such-file"),
        ("SCOPES_FILE", "."),
        ("PREFIX_SECRET_LIVE", "Live_"),
        ("PREFIX_SECRET_LIVE", "live"),
        ("PREFIX_SECRET_LIVE", "lk_test_"),
        ("PREFIX_PUBLISHABLE_TEST", "a" * 32 + "_"),
        ("PREFIX_REFRESH", "Refresh_"),
        ("PREFIX_REFRESH", "lk_"),
        ("TOKEN_ISSUER", "a\tb"),
        ("TOKEN_AUDIENCE", "a" * 256),
        ("ACCESS_TOKEN_SECONDS", "59"),
        ("ACCESS_TOKEN_SECONDS", "3601"),
        ("REFRESH_TOKEN_DAYS", "0"),
        ("POOL_SIZE", "0"),
        ("POOL_SIZE", "many"),
        ("USAGE_FLUSH_SECONDS", "0"),
        ("USAGE_FLUSH_SECONDS", "nan"),
        ("USAGE_RETENTION_DAYS", "0"),
        ("CONNECTION_AGE_SECONDS", "0.5"),
        ("DRAIN_SECONDS", "-1"),
        ("DRAIN_SECONDS", "inf"),
        ("VALIDATE_ACCESS", "closed"),
        ("ALLOW_PLAINTEXT", "perhaps"),
        ("WEBHOOK_PRIVATE_NETWORKS", "10.0.0.1/8"),
        ("WEBHOOK_PRIVATE_NETWORKS", "10.0.0.0/8 fd00::/8"),
        ("OUTBOX_POLL_SECONDS", "0"),
        ("EVENT_RETENTION_DAYS", "0"),
        ("EXPIRY_NOTICE_DAYS", "7,0"),
        ("EXPIRY_NOTICE_DAYS", "a week"),
        ("SMTP_HOST", "smtp.example.com"),
        ("SMTP_FROM", "keys@example.com"),
        ("SMTP_FROM", "nobody"),
        ("SMTP_PORT", "smtp"),
        ("SMTP_TLS", "perhaps"),
        ("SMTP_USER", "latchgate"),
        ("SMTP_PASSWORD", SECRET),
        ("OIDC_ISSUER", "login.example.com"),
        ("OIDC_ISSUER", "ftp://login.example.com"),
        ("OIDC_ISSUER", "https://"),
        ("OIDC_ISSUER", f"https://user:{SECRET}@login.example.com"),
        ("OIDC_ISSUER", "https://login.example.com:port"),
        ("OIDC_ISSUER", "https://login.example.com/?realm=a"),
        ("OIDC_ISSUER", "https://login.example.com"),
        ("OIDC_AUDIENCE", "latchgate"),
        ("OIDC_CLOCK_SKEW_SECONDS", "-1"),
        ("OIDC_CLOCK_SKEW_SECONDS", "301"),
        ("LOG_LEVEL", "loud"),
        ("LOG_FORMAT", "xml"),
    ],
)
def test_wrong_value(failing: Failing, name: str, value: str) -> None:
    """A value that can not be is status 2, and one line that names the variable and does not show a secret."""
    status, complaint = failing(**{name: value})
    assert_one_line(complaint, f"LATCHGATE_{name}")
    assert 2 == status


def test_several_wrong_values(failing: Failing) -> None:
    """All that are wrong are named at once, a line each: nobody has to start the service for each of them."""
    status, complaint = failing(LISTEN="here", TAG_KEY=SECRET, LOG_LEVEL="loud")
    lines = complaint.splitlines()
    named = {line.removeprefix("latchgate: LATCHGATE_").partition(":")[0] for line in lines}
    assert ({"LISTEN", "TAG_KEY", "LOG_LEVEL"}, 3, 2) == (named, len(lines), status)
    assert SECRET not in complaint


def test_gateways_over_http_can_not_be_known(failing: Failing) -> None:
    """Where gateways must say who they are, none may ask over HTTP: they could not. One line names both settings."""
    status, complaint = failing(HTTP_LISTEN="127.0.0.1:0", VALIDATE_ACCESS="authenticated")
    assert_one_line(complaint, "LATCHGATE_HTTP_LISTEN", "LATCHGATE_VALIDATE_ACCESS")
    assert 2 == status


def test_password_is_not_sent_in_plain_text(failing: Failing) -> None:
    """A password for a mail server that is spoken to in plain text is status 2, and one line that does not show it."""
    status, complaint = failing(
        SMTP_HOST="smtp.example.com", SMTP_FROM="a@example.com", SMTP_USER="a", SMTP_PASSWORD=SECRET, SMTP_TLS="none"
    )
    assert_one_line(complaint, "LATCHGATE_SMTP_TLS", "LATCHGATE_SMTP_PASSWORD")
    assert 2 == status


@pytest.mark.parametrize(
    "issuer", ["http://login.example.com", "http://10.0.0.1:8080/realms/a", "http://[2001:db8::1]"]
)
def test_issuer_in_plain_text(failing: Failing, issuer: str) -> None:
    """An issuer whose keys anyone on the way could replace is status 2, and one line that says what to do."""
    status, complaint = failing(OIDC_ISSUER=issuer, OIDC_AUDIENCE="latchgate")
    assert_one_line(complaint, "LATCHGATE_OIDC_ISSUER", "LATCHGATE_ALLOW_PLAINTEXT")
    assert 2 == status


@pytest.mark.parametrize("below", ["data", "data/below"])
def test_data_dir_is_no_folder(failing: Failing, tmp_path: Path, below: str) -> None:
    """A data directory that can not be made is status 2, and one line that names the variable."""
    (tmp_path / "data").write_text("a file")
    status, complaint = failing(DATABASE_URL=None, DATA_DIR=below)
    assert_one_line(complaint, "LATCHGATE_DATA_DIR", below)
    assert 2 == status


@pytest.mark.parametrize(
    "content",
    ["", "scopes = 1", "[scopes]\nthe orders = 1", '[scopes]\n"Orders" = "x"', '[scopes]\n"orders" = 1', "\0"],
)
def test_scopes_file(failing: Failing, tmp_path: Path, content: str) -> None:
    """A scopes file of another form is status 2, and one line that names variable and file."""
    (tmp_path / "scopes.toml").write_text(content)
    status, complaint = failing(SCOPES_FILE="scopes.toml")
    assert_one_line(complaint, "LATCHGATE_SCOPES_FILE", "scopes.toml")
    assert 2 == status


@pytest.fixture
def certificates(tmp_path: Path) -> Iterator[Path]:
    """A folder with a good pair of files, a key of another, and a file that is neither."""
    authority = trustme.CA()
    issued = authority.issue_cert("localhost")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    authority.issue_cert("localhost").private_key_pem.write_to_path(tmp_path / "other.pem")
    (tmp_path / "text.pem").write_text(SECRET)
    return iter([tmp_path])


@pytest.mark.parametrize(
    ("certificate", "key"),
    [("none.pem", "key.pem"), ("cert.pem", "none.pem"), ("cert.pem", "other.pem"), ("text.pem", "key.pem")],
)
def test_certificate(failing: Failing, certificates: Iterator[Path], certificate: str, key: str) -> None:
    """Certificate files that are not there or do not fit are status 2, and one line that names variable and file."""
    del certificates
    status, complaint = failing(TLS_CERT=certificate, TLS_KEY=key)
    wrong = certificate if certificate != "cert.pem" else key
    assert_one_line(complaint, "LATCHGATE_TLS_CERT", wrong)
    assert 2 == status


@pytest.mark.parametrize("name", ["LISTEN", "METRICS_LISTEN"])
def test_port_in_use(failing: Failing, name: str) -> None:
    """A port that another program listens on is status 1, and one line that names variable and address."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        status, complaint = failing(**{name: address})
    assert_one_line(complaint, f"LATCHGATE_{name}", address)
    assert 1 == status


@pytest.mark.parametrize("name", ["LISTEN", "METRICS_LISTEN"])
def test_foreign_address(failing: Failing, name: str) -> None:
    """An address that is not this machine's is status 1, and one line that names variable and address."""
    status, complaint = failing(**{name: "203.0.113.1:0", "ALLOW_PLAINTEXT": "true"})
    assert_one_line(complaint, f"LATCHGATE_{name}", "203.0.113.1:0")
    assert 1 == status


def test_slip_of_the_pen() -> None:
    """A variable that begins like ours and is none is told; one that Kubernetes makes for a service is not."""
    ours = {"LATCHGATE_LISTEN": "x", "LATCHGATE_LOG_LEVEL": "info"}
    slips = {
        "LATCHGATE_LISTEN_PORT": "50051",
        "LATCHGATE_DATABASE_URI": "postgresql://",
        "LATCHGATE_TLS_CERTIFICATE": "",
    }
    kubernetes = {
        "LATCHGATE_SERVICE_HOST": "10.0.0.1",
        "LATCHGATE_SERVICE_PORT": "50051",
        "LATCHGATE_SERVICE_PORT_GRPC": "50051",
        "LATCHGATE_PORT": "tcp://10.0.0.1:50051",
        "LATCHGATE_PORT_50051_TCP": "tcp://10.0.0.1:50051",
        "LATCHGATE_PORT_50051_TCP_ADDR": "10.0.0.1",
        "LATCHGATE_PORT_50051_TCP_PORT": "50051",
        "LATCHGATE_PORT_50051_TCP_PROTO": "tcp",
        # Of a service by the name of `latchgate-metrics`.
        "LATCHGATE_METRICS_SERVICE_HOST": "10.0.0.2",
        "LATCHGATE_METRICS_SERVICE_PORT": "9464",
        "LATCHGATE_METRICS_PORT": "tcp://10.0.0.2:9464",
        "LATCHGATE_METRICS_PORT_9464_TCP_ADDR": "10.0.0.2",
    }
    assert sorted(slips) == unknown_variables({"PATH": ""} | ours | slips | kubernetes)


async def test_process(tmp_path: Path) -> None:
    """What is true of settings within a test is true of the command: status 2, one line on standard error, no more."""
    status, out, err = await run_latchgate("serve", tmp_path, environment(TAG_KEY=SECRET))
    assert (2, []) == (status, out)
    assert_one_line("\n".join(err) + "\n", "LATCHGATE_TAG_KEY")


async def test_port_in_use_of_process(tmp_path: Path) -> None:
    """No library adds lines of its own to the one that says which port is in use."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        variables = environment(LISTEN=address, METRICS_LISTEN="127.0.0.1:0", DATABASE_URL="postgresql://127.0.0.1:1/x")
        status, out, err = await run_latchgate("serve", tmp_path, variables)
    assert (1, []) == (status, out)
    assert_one_line("\n".join(err) + "\n", "LATCHGATE_LISTEN", address)


def test_unexpected_fault(failing: Failing, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault that nobody expected is one line as well: what and where, and not its text, which may hold a secret."""

    def fail() -> None:
        raise RuntimeError(SECRET)

    monkeypatch.setattr("latchgate.config.load", fail)
    status, complaint = failing()
    assert_one_line(complaint, "RuntimeError", "cli.py")
    assert 1 == status


def test_missing_package(failing: Failing, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation that lacks a package is told by the package's name."""
    monkeypatch.delitem(sys.modules, "latchgate.commands")
    monkeypatch.delattr("latchgate.commands")
    monkeypatch.setitem(sys.modules, "latchgate.workers.supervisor", None)
    status, complaint = failing()
    assert_one_line(complaint, "installation", "latchgate.workers.supervisor")
    assert 1 == status
