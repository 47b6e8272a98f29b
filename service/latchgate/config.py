"""Settings, from the environment: read once, checked once, frozen."""

from __future__ import annotations

import ipaddress
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from datetime import timedelta
from email.utils import parseaddr
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Self
from urllib.parse import parse_qsl, urlsplit

from pydantic import AfterValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from latchgate.domain.effects import MAX_LEASE_S
from latchgate.domain.families import MAX_ACCESS, TokenTerms
from latchgate.domain.model import Environment, KeyType, Network, Scope, ScopeSource
from latchgate.domain.refresh import DEFAULT_PREFIX
from latchgate.domain.token import FOREIGN_MAX_LENGTH, Prefixes
from latchgate.outbound.smtp import SmtpServer, SmtpTls

PREFIX = "LATCHGATE_"
MIN_SECRET_LENGTH = 32
MAX_PORT = 65535
# Kubernetes makes variables of these forms for every service whose name is or begins with `latchgate`; they are none of
# ours. The bare ..._PORT is told by its value, an address: it could be a slip of the pen as well.
_FROM_KUBERNETES = re.compile(
    r"^LATCHGATE(_[A-Z0-9_]+)?_(SERVICE_(HOST|PORT(_[A-Z0-9_]+)?)|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)$"
)
_KUBERNETES_ADDRESS = re.compile(r"^(tcp|udp|sctp)://")
_DATABASE_URL_FORM = (
    "can not be read; write postgresql://user:password@host:5432/name, and in the password %40 for @, %3A for :, "
    "%2F for /, %3F for ? and %23 for #"
)
_SSL_MODES = frozenset({"disable", "allow", "prefer", "require", "verify-ca", "verify-full"})
_SSL_FILES = frozenset({"sslrootcert", "sslcert", "sslkey", "sslcrl"})
MAX_WORKERS = 256
MAX_CLAIM_LENGTH = 255
_SMTP_PORTS = {SmtpTls.STARTTLS: 587, SmtpTls.TLS: 465, SmtpTls.NONE: 25}


class CommandError(Exception):
    """A command can not do its work. The message is one line that says what to do; `status` is the exit status."""

    status = 1


class SettingsError(CommandError):
    """Settings are wrong. The message has a line for each, which names the variable and never holds a secret value."""

    status = 2


class LogFormat(Enum):
    """How log lines are written."""

    JSON = "json"
    CONSOLE = "console"


class LogLevel(Enum):
    """From which severity on lines are logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class ValidateAccess(Enum):
    """Who may call Validate."""

    OPEN = "open"
    AUTHENTICATED = "authenticated"


def _address(value: str) -> str:
    host, _, port = value.rpartition(":")
    if not host or not _is_port(port):
        raise ValueError("must be host:port, such as 127.0.0.1:50051 or [::1]:50051")
    return value


def _database_url(value: SecretStr) -> SecretStr:
    """Demands an address that the driver can read: one that it can not would be waited for in vain."""
    url = value.get_secret_value()
    if not url.startswith(("postgresql://", "postgres://")):
        raise ValueError("must begin with postgresql://")
    try:
        parts = urlsplit(url)
        options = dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
    except ValueError:
        raise ValueError(_DATABASE_URL_FORM) from None
    hosts = parts.netloc.partition("@")[2] if "@" in parts.netloc else parts.netloc
    ports = [re.sub(r"^(\[[^]]*\]|[^:]*):?", "", host) for host in hosts.split(",")]
    ports += options.get("port", "").split(",")
    if "@" in hosts or not all(port == "" or (_is_port(port) and int(port)) for port in ports):
        raise ValueError(_DATABASE_URL_FORM)
    if options.get("sslmode", "prefer") not in _SSL_MODES:
        raise ValueError("sslmode must be disable, allow, prefer, require, verify-ca or verify-full")
    for name in sorted(_SSL_FILES & options.keys()):
        if not Path(options[name]).is_file():
            raise ValueError(f"{name} names a file that is not there")
    return value


def _is_port(text: str) -> bool:
    return bool(re.fullmatch(r"[0-9]{1,5}", text)) and int(text) <= MAX_PORT


def _long_enough(value: SecretStr) -> SecretStr:
    length = len(value.get_secret_value())
    if not MIN_SECRET_LENGTH <= length <= FOREIGN_MAX_LENGTH:
        raise ValueError(f"must be {MIN_SECRET_LENGTH} to {FOREIGN_MAX_LENGTH} characters long; this is {length}")
    return value


def _prefix(value: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,29}_", value):
        raise ValueError("must be at most 31 lower-case letters, digits and `_`, the first a letter and the last a `_`")
    return value


def _networks(value: str) -> str:
    try:
        _read_networks(value)
    except ValueError:
        raise ValueError("must be networks such as 10.0.0.0/8,fd00::/8, with a comma between them") from None
    return value


def _read_networks(value: str) -> tuple[Network, ...]:
    return tuple(ipaddress.ip_network(each.strip()) for each in value.split(",") if each.strip())


def _days(value: str) -> str:
    if not re.fullmatch(r"[0-9]{1,3}(,[0-9]{1,3})*", value) or "0" in value.split(","):
        raise ValueError("must be numbers of days from 1 to 999, with a comma between them, such as 7,1")
    return value


def _mail_sender(value: str) -> str:
    if "@" not in parseaddr(value)[1] or any(sign < " " for sign in value):
        raise ValueError("must be a mail address, such as Latchgate <keys@example.com>")
    return value


def _issuer_url(value: str) -> str:
    """Demands the address of an issuer, as in OpenID Connect Core 1.0, section 2: without a query or a password."""
    try:
        parts = urlsplit(value)
        is_address = parts.scheme in {"https", "http"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_address = False
    if not is_address or parts.query or parts.fragment or "@" in parts.netloc or not value.isascii():
        raise ValueError("must be the issuer's address as it writes it, such as https://login.example.com")
    return value


def _claim(value: str) -> str:
    if not 0 < len(value) <= MAX_CLAIM_LENGTH or not value.isprintable():
        raise ValueError(
            f"must be 1 to {MAX_CLAIM_LENGTH} characters that can be printed, such as https://keys.example.com"
        )
    return value


def _own_cores() -> int:
    """How many cores this process may run on."""
    return min(len(os.sched_getaffinity(0)), MAX_WORKERS)


Address = Annotated[str, AfterValidator(_address)]
Secret = Annotated[SecretStr, AfterValidator(_long_enough)]
TokenPrefix = Annotated[str, AfterValidator(_prefix)]
Networks = Annotated[str, AfterValidator(_networks)]
Days = Annotated[str, AfterValidator(_days)]
IssuerUrl = Annotated[str, AfterValidator(_issuer_url)]
Claim = Annotated[str, AfterValidator(_claim)]
MailSender = Annotated[str, AfterValidator(_mail_sender)]


class Settings(BaseSettings):
    """All settings. Each is the environment variable `LATCHGATE_` and its name in capitals."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, env_ignore_empty=True, extra="ignore")

    database_url: Annotated[SecretStr, AfterValidator(_database_url)] | None = None
    owner_database_url: Annotated[SecretStr, AfterValidator(_database_url)] | None = None
    data_dir: Path = Path(".latchgate")
    pool_size: int = Field(default=10, ge=1, le=1000)
    lease_seconds: float = Field(default=10.0, ge=0.2, le=MAX_LEASE_S)
    cache_keys: int = Field(default=200_000, ge=1)
    answer_ttl_seconds: float = Field(default=0.0, ge=0, le=3600)
    listen: Address = "127.0.0.1:50051"
    metrics_listen: Address = "127.0.0.1:9464"
    http_listen: Address | None = None
    workers: int = Field(default_factory=_own_cores, ge=1, le=MAX_WORKERS)
    root_token: Secret | None = None
    tag_key: Secret | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    allow_plaintext: bool = False
    validate_access: ValidateAccess = ValidateAccess.OPEN
    trusted_hops: int = Field(default=0, ge=0, le=10)
    scopes_file: Path | None = None
    oidc_issuer: IssuerUrl | None = None
    oidc_audience: str | None = Field(default=None, min_length=1, max_length=255)
    oidc_organization_claim: str = Field(default="organization_id", min_length=1, max_length=255)
    oidc_permissions_claim: str = Field(default="scope", min_length=1, max_length=255)
    oidc_clock_skew_seconds: int = Field(default=30, ge=0, le=300)
    prefix_secret_live: TokenPrefix = "lk_"  # noqa: S105 - a prefix is public
    prefix_secret_test: TokenPrefix = "lk_test_"  # noqa: S105 - a prefix is public
    prefix_publishable_live: TokenPrefix = "lk_pk_"
    prefix_publishable_test: TokenPrefix = "lk_pk_test_"
    prefix_refresh: TokenPrefix = DEFAULT_PREFIX
    token_issuer: Claim = "latchgate"  # noqa: S105 - a name
    token_audience: Claim = "latchgate"  # noqa: S105 - a name
    access_token_seconds: int = Field(default=300, ge=60, le=int(MAX_ACCESS.total_seconds()))
    refresh_token_days: int = Field(default=30, ge=1, le=365)
    usage_flush_seconds: float = Field(default=5.0, gt=0, le=3600)
    usage_retention_days: int = Field(default=90, ge=1, le=3650)
    audit_retention_days: int = Field(default=400, ge=30, le=36_500)
    connection_age_seconds: float = Field(default=60.0, ge=1, le=86_400)
    drain_seconds: float = Field(default=20.0, ge=0, le=3600)
    webhook_private_networks: Networks = ""
    outbox_poll_seconds: float = Field(default=1.0, ge=0.01, le=60)
    event_retention_days: int = Field(default=30, ge=1, le=3650)
    expiry_notice_days: Days = "7,1"
    smtp_host: str | None = None
    smtp_port: int | None = Field(default=None, ge=1, le=MAX_PORT)
    smtp_tls: SmtpTls = SmtpTls.STARTTLS
    smtp_user: str = ""
    smtp_password: SecretStr | None = None
    smtp_from: MailSender | None = None
    log_level: LogLevel = LogLevel.INFO
    log_format: LogFormat = LogFormat.CONSOLE

    @property
    def token_prefixes(self) -> Prefixes:
        """The prefix of each type and environment."""
        return {
            (KeyType.SECRET, Environment.LIVE): self.prefix_secret_live,
            (KeyType.SECRET, Environment.TEST): self.prefix_secret_test,
            (KeyType.PUBLISHABLE, Environment.LIVE): self.prefix_publishable_live,
            (KeyType.PUBLISHABLE, Environment.TEST): self.prefix_publishable_test,
        }

    @property
    def token_terms(self) -> TokenTerms:
        """What is said of the tokens that keys are exchanged for."""
        return TokenTerms(
            issuer=self.token_issuer,
            audience=self.token_audience,
            access=timedelta(seconds=self.access_token_seconds),
            refresh=timedelta(days=self.refresh_token_days),
        )

    @property
    def private_networks(self) -> tuple[Network, ...]:
        """The networks to which webhooks may be sent besides the public ones."""
        return _read_networks(self.webhook_private_networks)

    @property
    def notice_days(self) -> tuple[int, ...]:
        """How many days before its expiry a key is told of."""
        return tuple(int(days) for days in self.expiry_notice_days.split(","))

    @property
    def smtp_server(self) -> SmtpServer | None:
        """The server that mail is handed to; None if none is sent."""
        if self.smtp_host is None or self.smtp_from is None:
            return None
        return SmtpServer(
            host=self.smtp_host,
            port=self.smtp_port or _SMTP_PORTS[self.smtp_tls],
            tls=self.smtp_tls,
            sender=self.smtp_from,
            user=self.smtp_user,
            password=self.smtp_password.get_secret_value() if self.smtp_password else "",
        )

    @model_validator(mode="after")
    def _check_mail(self) -> Self:
        if (self.smtp_host is None) != (self.smtp_from is None):
            raise ValueError("LATCHGATE_SMTP_HOST and LATCHGATE_SMTP_FROM: must be set together")
        if bool(self.smtp_user) != (self.smtp_password is not None):
            raise ValueError("LATCHGATE_SMTP_USER and LATCHGATE_SMTP_PASSWORD: must be set together")
        if self.smtp_user and self.smtp_tls is SmtpTls.NONE:
            raise ValueError("LATCHGATE_SMTP_TLS: none would send LATCHGATE_SMTP_PASSWORD in plain text")
        return self

    @model_validator(mode="after")
    def _check_issuer(self) -> Self:
        if (self.oidc_issuer is None) != (self.oidc_audience is None):
            raise ValueError(
                "LATCHGATE_OIDC_ISSUER and LATCHGATE_OIDC_AUDIENCE: must be set together, so that a JWT "
                "which the issuer has made for another service lets nobody in"
            )
        if self.oidc_issuer and self.oidc_issuer.startswith("http:") and not self.allow_plaintext:
            host = urlsplit(self.oidc_issuer).netloc
            if not _is_loopback(host if re.search(r":[0-9]+$", host) else f"{host}:80"):
                raise ValueError(
                    "LATCHGATE_OIDC_ISSUER: whoever is on the way could give out keys of its own over http; use https, "
                    "or set LATCHGATE_ALLOW_PLAINTEXT=true"
                )
        return self

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.owner_database_url is not None and self.database_url is None:
            raise ValueError("LATCHGATE_OWNER_DATABASE_URL: needs LATCHGATE_DATABASE_URL")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("LATCHGATE_TLS_CERT and LATCHGATE_TLS_KEY: must be set together")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("LATCHGATE_TLS_CLIENT_CA: needs LATCHGATE_TLS_CERT and LATCHGATE_TLS_KEY")
        if self.http_listen and not self.allow_plaintext and not _is_loopback(self.http_listen):
            raise ValueError(
                f"LATCHGATE_HTTP_LISTEN: {self.http_listen} can be reached from other machines, and tokens would cross "
                "the network in plain text; listen on a loopback address, or set LATCHGATE_ALLOW_PLAINTEXT=true"
            )
        if self.http_listen and self.validate_access is ValidateAccess.AUTHENTICATED:
            raise ValueError(
                "LATCHGATE_HTTP_LISTEN: gateways that ask over HTTP can not say who they are, as "
                "LATCHGATE_VALIDATE_ACCESS=authenticated demands; unset one of the two"
            )
        if self.tls_cert is None and not self.allow_plaintext and not _is_loopback(self.listen):
            raise ValueError(
                f"LATCHGATE_LISTEN: {self.listen} can be reached from other machines, and tokens would cross the "
                "network in plain text; set LATCHGATE_TLS_CERT and LATCHGATE_TLS_KEY, or LATCHGATE_ALLOW_PLAINTEXT=true"
            )
        if len({*self.token_prefixes.values(), self.prefix_refresh}) != len(self.token_prefixes) + 1:
            raise ValueError(
                "LATCHGATE_PREFIX_REFRESH, LATCHGATE_PREFIX_SECRET_LIVE and the other three: must all differ"
            )
        return self


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def load(**overrides: Any) -> Settings:
    """Reads the settings. Raises SettingsError."""
    try:
        return Settings(**overrides)
    except ValidationError as error:
        raise SettingsError("\n".join(_lines(error))) from None


def as_variables(settings: Settings, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Gives the environment in which another process finds these same settings. It holds their secrets."""
    variables = {name: value for name, value in environment.items() if not name.startswith(PREFIX)}
    for name in Settings.model_fields:
        value = getattr(settings, name)
        if isinstance(value, SecretStr):
            value = value.get_secret_value()
        elif isinstance(value, Enum):
            value = value.value
        if value is not None:
            variables[PREFIX + name.upper()] = str(value)
    return variables


def _lines(error: ValidationError) -> Iterator[str]:
    """Writes each problem in one line, without the value: it may be a secret."""
    for problem in error.errors(include_input=False, include_url=False):
        message = problem["msg"].removeprefix("Value error, ")
        yield f"{PREFIX}{str(problem['loc'][0]).upper()}: {message}" if problem["loc"] else message


def unknown_variables(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Lists variables that begin like ours and are none: most likely a slip of the pen."""
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    return sorted(
        name
        for name, value in environment.items()
        if name.startswith(PREFIX) and name not in known and not _is_from_kubernetes(name, value)
    )


def _is_from_kubernetes(name: str, value: str) -> bool:
    return bool(_FROM_KUBERNETES.match(name) or (name.endswith("_PORT") and _KUBERNETES_ADDRESS.match(value)))


def load_scopes(path: Path | None) -> tuple[Scope, ...]:
    """Reads the deployment's own scopes: a TOML file with a table `scopes` of names and descriptions.

    Raises SettingsError.
    """
    if path is None:
        return ()
    try:
        table = tomllib.loads(path.read_text())["scopes"]
    except OSError as error:
        raise SettingsError(f"LATCHGATE_SCOPES_FILE: {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, KeyError):
        table = None
    if not isinstance(table, dict):
        raise SettingsError(f"LATCHGATE_SCOPES_FILE: {path}: must be TOML with a table [scopes]")
    for name, description in table.items():
        if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]*(:[a-z0-9][a-z0-9_.-]*)*", name) or not isinstance(description, str):
            raise SettingsError(
                f'LATCHGATE_SCOPES_FILE: {path}: {name!r} must be written as "orders:read" = "What it allows."'
            )
    return tuple(
        Scope(name=name, description=description, source=ScopeSource.DEPLOYMENT) for name, description in table.items()
    )
