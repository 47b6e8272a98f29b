"""The services on the port, and the use cases behind them: put together here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from latchgate.background import Background
from latchgate.config import Settings
from latchgate.domain.addresses import AddressGuard
from latchgate.domain.catalogue import ScopeManager
from latchgate.domain.importing import KeyImporter
from latchgate.domain.keyring import Keyring
from latchgate.domain.keys import KeyManager
from latchgate.domain.logins import Login
from latchgate.domain.model import Scope
from latchgate.domain.organizations import OrganizationManager
from latchgate.domain.refresh import RefreshTokenFormat
from latchgate.domain.suspicion import SuspicionCounter
from latchgate.domain.token import TokenFormat
from latchgate.domain.tokens import TokenManager
from latchgate.domain.trail import AuditReader
from latchgate.domain.usage import UsageReporter
from latchgate.domain.validation import Validator
from latchgate.domain.webhooks import WebhookManager
from latchgate.ids import make_id
from latchgate.observability import Metrics
from latchgate.rpc.answers import AnswerWriter
from latchgate.rpc.audit_service import AuditService
from latchgate.rpc.check_request import CheckReader
from latchgate.rpc.check_response import CheckWriter
from latchgate.rpc.ext_authz import CheckRecall, ExtAuthz
from latchgate.rpc.import_service import ImportService
from latchgate.rpc.key_service import KeyService
from latchgate.rpc.organization_service import OrganizationService
from latchgate.rpc.pages import PageTokens
from latchgate.rpc.pipeline import Backend, FromMemory, Pipeline, method_name
from latchgate.rpc.recall import Recall
from latchgate.rpc.server import (
    AUDIT_SERVICE,
    CHECK,
    EXT_AUTHZ_SERVICE,
    IMPORT_SERVICE,
    KEY_SERVICE,
    ORGANIZATION_SERVICE,
    TOKEN_SERVICE,
    USAGE_SERVICE,
    VALIDATE,
    WEBHOOK_SERVICE,
    RpcServer,
)
from latchgate.rpc.token_service import TokenService
from latchgate.rpc.usage_service import UsageService
from latchgate.rpc.webhook_service import WebhookService
from latchgate.storage.audit import PostgresTrail
from latchgate.storage.effects import EffectPoller
from latchgate.storage.postgres import Database
from latchgate.storage.reports import PostgresUsageStore
from latchgate.storage.requests import RequestSealer
from latchgate.storage.stores import PostgresStore
from latchgate.storage.suspicion import SuspicionStore
from latchgate.storage.tokens import PostgresTokenStore
from latchgate.storage.usage import UsageBuffer
from latchgate.storage.webhooks import FernetWebhookSealer, PostgresWebhookStore
from latchgate.web.auth import AuthEndpoint
from latchgate.web.jwks import JwksPage
from latchgate.web.server import HttpServer

_log = structlog.get_logger("latchgate.app")


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What there is before the database is."""

    settings: Settings
    scopes: tuple[Scope, ...]
    metrics: Metrics
    database: Database
    usage: UsageBuffer
    background: Background
    pipeline: Pipeline
    server: RpcServer
    endpoint: AuthEndpoint
    jwks: JwksPage
    http: HttpServer
    shares_ports: bool
    # Set when there may be something to be sent out.
    news: asyncio.Event


@dataclass(frozen=True, slots=True, kw_only=True)
class Core:
    """What is made once the database is there, and what the services have in common."""

    tokens: TokenFormat
    tag_key: bytes
    validator: Validator
    effects: EffectPoller
    suspects: SuspicionCounter
    suspicion: SuspicionStore
    login: Login | None
    keyring: Keyring
    boottime: Callable[[], float]


def tell_of_lost_keys(kids: Sequence[str]) -> None:
    """Says that tokens are signed with another key, because the one to sign with can not be read."""
    _log.warning(
        "signing_keys_unreadable",
        kids=list(kids),
        advice="they were encrypted under another LATCHGATE_TAG_KEY; a new one signs now, which gateways "
        "know once they have fetched the keys again",
    )


def _token_service(parts: Parts, core: Core) -> TokenService:
    tokens = TokenManager(
        store=PostgresTokenStore(parts.database),
        keyring=core.keyring,
        tokens=RefreshTokenFormat(core.tag_key, parts.settings.prefix_refresh),
        sealer=RequestSealer(core.tag_key),
        terms=parts.settings.token_terms,
        make_id=make_id,
        uses=parts.usage,
        suspicion=core.suspects,
    )
    return TokenService(tokens=tokens, keyring=core.keyring, observer=parts.metrics)


def make_backend(parts: Parts, core: Core) -> Backend:
    """Puts the services together, and the use cases behind them."""
    tag_key, validator, effects = core.tag_key, core.validator, core.effects
    pages, metrics = PageTokens(tag_key), parts.metrics
    store = PostgresStore(parts.database, parts.news.set)
    reader, writer = CheckReader(parts.settings.trusted_hops), CheckWriter()
    answers = AnswerWriter(parts.settings.answer_ttl_seconds)
    keys = KeyManager(
        store=store,
        tokens=core.tokens,
        sealer=RequestSealer(tag_key),
        effects=effects,
        make_id=make_id,
        deployment_scopes=parts.scopes,
    )
    organizations = OrganizationManager(store=store, effects=effects, make_id=make_id, deployment_scopes=parts.scopes)
    importer = KeyImporter(
        store=store, tokens=core.tokens, effects=effects, make_id=make_id, deployment_scopes=parts.scopes
    )
    webhooks = WebhookManager(
        store=PostgresWebhookStore(parts.database, parts.news.set),
        sealer=FernetWebhookSealer(tag_key),
        guard=AddressGuard(parts.settings.private_networks),
        make_id=make_id,
    )
    services = {
        KEY_SERVICE.full_name: KeyService(
            keys=keys,
            scopes=ScopeManager(store=store, deployment_scopes=parts.scopes),
            validator=validator,
            pages=pages,
            outcomes=metrics,
            answers=answers,
        ),
        IMPORT_SERVICE.full_name: ImportService(importer=importer),
        ORGANIZATION_SERVICE.full_name: OrganizationService(organizations=organizations, pages=pages),
        AUDIT_SERVICE.full_name: AuditService(
            trail=AuditReader(PostgresTrail(parts.database), core.suspicion), pages=pages
        ),
        USAGE_SERVICE.full_name: UsageService(
            usage=UsageReporter(PostgresUsageStore(parts.database, store)), pages=pages
        ),
        TOKEN_SERVICE.full_name: _token_service(parts, core),
        WEBHOOK_SERVICE.full_name: WebhookService(webhooks=webhooks, pages=pages),
        EXT_AUTHZ_SERVICE.full_name: ExtAuthz(validator=validator, reader=reader, writer=writer, outcomes=metrics),
    }
    recalls: dict[str, FromMemory] = {
        VALIDATE.full_name: Recall(validator, answers, metrics.tally(method_name(VALIDATE)), metrics).answer,
        CHECK.full_name: CheckRecall(validator, reader, writer, metrics.tally(method_name(CHECK)), metrics).answer,
    }
    return Backend(
        validator=validator,
        login=core.login,
        trail=store,
        recalls=recalls,
        boottime=core.boottime,
        services=services,
    )
