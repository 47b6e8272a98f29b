"""A newcomer with stock grpcurl, and nothing else, takes a key through its whole life."""

from __future__ import annotations

import json
from typing import Any

import pytest

from support.service import RunningService, run_service
from support.tokens import exchange
from support.transport import eventually, grpcurl
from support.webhooks import LOOPBACK, receiver


class Terminal:
    """Types grpcurl lines, as root."""

    def __init__(self, service: RunningService) -> None:
        self.service = service

    async def ask(self, method: str, **request: Any) -> Any:
        """Makes a call that must succeed, and gives its answer."""
        finished = await self._call(method, request)
        assert "" == finished.err
        return json.loads(finished.out)

    async def fail(self, method: str, **request: Any) -> str:
        """Makes a call that must be refused, and gives what grpcurl prints of it."""
        finished = await self._call(method, request)
        assert finished.status != 0
        return str(finished.err)

    async def outcome(self, token: str, **fields: Any) -> str:
        """Asks Validate."""
        answer = await self.ask("KeyService/Validate", token=token, **fields)
        return str(answer["outcome"]).removeprefix("OUTCOME_")

    async def _call(self, method: str, request: dict[str, Any]) -> Any:
        header = f"authorization: {self.service.root[0][1]}"
        return await grpcurl("-H", header, "-d", json.dumps(request), self.service.address, f"apikeys.v1.{method}")


@pytest.fixture
def terminal(service: RunningService) -> Terminal:
    """A terminal beside a running service."""
    return Terminal(service)


async def test_whole_life(terminal: Terminal) -> None:
    """Create, validate, list, toggle, rotate with grace, revoke: each does what it says, seen through Validate."""
    organization = await terminal.ask("OrganizationService/CreateOrganization", organization_id="acme", name="Acme")
    assert organization["organization"]["active"]
    created = await terminal.ask("KeyService/CreateKey", organization_id="acme", name="ci", permissions=["read"])
    key_id, first = created["key"]["id"], created["token"]
    assert "VALID" == await terminal.outcome(first, required_permissions=["read"])
    assert "PERMISSION_DENIED" == await terminal.outcome(first, required_permissions=["write"])

    listed = await terminal.ask("KeyService/ListKeys", organization_id="acme")
    assert [key_id] == [key["id"] for key in listed["keys"]]

    await terminal.ask("KeyService/ToggleKey", key_id=key_id, active=False)
    assert "INACTIVE" == await terminal.outcome(first)
    await terminal.ask("KeyService/ToggleKey", key_id=key_id)
    assert "VALID" == await terminal.outcome(first)

    second = (await terminal.ask("KeyService/RotateKey", key_id=key_id, grace_period="3600s"))["token"]
    assert ["VALID", "VALID"] == [await terminal.outcome(first), await terminal.outcome(second)]
    third = (await terminal.ask("KeyService/RotateKey", key_id=key_id))["token"]
    outcomes = [await terminal.outcome(token) for token in (first, second, third)]
    assert ["REVOKED", "REVOKED", "VALID"] == outcomes

    revoked = await terminal.ask("KeyService/RevokeKey", key_id=key_id, reason="left the company")
    assert "EFFECT_STATE_EFFECTIVE" == revoked["effect"]["state"]
    assert "REVOKED" == await terminal.outcome(third)


async def test_scopes_and_a_key_that_comes_back(terminal: Terminal) -> None:
    """An organization's scope is made, needed by a key and removed; a deleted key says when it will be gone for good,
    and comes back.
    """
    await terminal.ask("OrganizationService/CreateOrganization", organization_id="acme", name="Acme")
    of_acme = {"organization_id": "acme", "name": "orders:read"}
    made = await terminal.ask("KeyService/CreateScope", **of_acme, description="Read orders.")
    assert "SCOPE_SOURCE_ORGANIZATION" == made["scope"]["source"]
    listed = await terminal.ask("KeyService/ListScopes", organization_id="acme")
    assert made["scope"] in listed["scopes"]
    created = await terminal.ask("KeyService/CreateKey", organization_id="acme", name="ci", permissions=["orders:read"])
    key_id = created["key"]["id"]
    told = await terminal.fail("KeyService/DeleteScope", **of_acme)
    assert "SCOPE_IN_USE" in told
    assert key_id in told

    deleted = await terminal.ask("KeyService/DeleteKey", key_id=key_id)
    assert deleted["key"]["purge_time"] > deleted["key"]["revoke_time"]
    assert "REVOKED" == await terminal.outcome(created["token"])
    undeleted = await terminal.ask("KeyService/UndeleteKey", key_id=key_id)
    assert ("KEY_STATE_ACTIVE", False) == (undeleted["key"]["state"], "purge_time" in undeleted["key"])
    assert "VALID" == await terminal.outcome(created["token"], required_permissions=["orders:read"])

    await terminal.ask("KeyService/RevokeKey", key_id=key_id)
    left = await terminal.ask("KeyService/DeleteScope", **of_acme)
    assert "orders:read" not in [scope["name"] for scope in left["scopes"]]


async def test_usage(terminal: Terminal) -> None:
    """How a key is used, and which keys are not, is told without any more than the organization or the key."""
    await terminal.ask("OrganizationService/CreateOrganization", organization_id="acme", name="Acme")
    created = await terminal.ask("KeyService/CreateKey", organization_id="acme", name="ci")
    assert "VALID" == await terminal.outcome(created["token"])
    usage = await terminal.ask("UsageService/GetUsage", key_id=created["key"]["id"], step="USAGE_STEP_DAY")
    assert 30 == len(usage["buckets"])
    unused = await terminal.ask("UsageService/ListUnusedKeys", organization_id="acme", unused_days=1)
    assert ["unused_since_time"] == list(unused)
    assert "unused_days: must be" in await terminal.fail("UsageService/ListUnusedKeys", organization_id="acme")


async def test_access_tokens(terminal: Terminal) -> None:
    """A key is exchanged, its tokens are refreshed, and their end is told; the keys to verify them with are shown."""
    await terminal.ask("OrganizationService/CreateOrganization", organization_id="acme", name="Acme")
    created = await terminal.ask("KeyService/CreateKey", organization_id="acme", name="ci", permissions=["read"])
    grant = await exchange(terminal.service, created["token"])
    following = await terminal.ask("TokenService/RefreshToken", refresh_token=grant.refresh_token)
    assert "Bearer" == following["token_type"]
    (key,) = (await terminal.ask("TokenService/GetJwks"))["keys"]
    assert ("EC", "sig") == (key["kty"], key["use"])
    assert {} == await terminal.ask("TokenService/RevokeToken", refresh_token=following["refresh_token"])
    told = await terminal.fail("TokenService/RefreshToken", refresh_token=following["refresh_token"])
    assert "exchange the key again" in told
    assert key["kid"] != (await terminal.ask("TokenService/RotateSigningKeys"))["key"]["kid"]


async def test_webhook(database_url: str) -> None:
    """A webhook is made, tried, looked at, given another secret, switched off and deleted; it is sent what happens."""
    async with receiver() as listener, run_service(database_url, webhook_private_networks=LOOPBACK) as service:
        terminal = Terminal(service)
        await terminal.ask("OrganizationService/CreateOrganization", organization_id="acme", name="Acme")
        created = await terminal.ask("WebhookService/CreateWebhook", organization_id="acme", url=listener.url)
        webhook_id = created["webhook"]["id"]
        await terminal.ask("KeyService/CreateKey", organization_id="acme", name="ci")
        (received,) = await listener.until(1)
        assert "ci" == received.verified(created["secret"])["data"]["key"]["name"]
        await terminal.ask("WebhookService/SendTestEvent", webhook_id=webhook_id)
        await listener.until(2)

        async def are_delivered() -> bool:
            listed = await terminal.ask("WebhookService/ListWebhookDeliveries", webhook_id=webhook_id)
            return ["WEBHOOK_DELIVERY_STATE_DELIVERED"] * 2 == [each["state"] for each in listed["deliveries"]]

        await eventually(are_delivered)
        assert {} == await terminal.ask("WebhookService/RedeliverWebhook", webhook_id=webhook_id)
        rotated = await terminal.ask("WebhookService/RotateWebhookSecret", webhook_id=webhook_id)
        assert created["secret"] != rotated["secret"]
        off = await terminal.ask(
            "WebhookService/UpdateWebhook", webhook={"id": webhook_id}, update_mask={"paths": ["enabled"]}
        )
        assert "WEBHOOK_DISABLE_REASON_CALLER" == off["webhook"]["disable_reason"]
        assert '"reason":"WEBHOOK_DISABLED"' in (
            await terminal.fail("WebhookService/SendTestEvent", webhook_id=webhook_id)
        ).replace(" ", "")
        await terminal.ask("WebhookService/DeleteWebhook", webhook_id=webhook_id)
        assert {} == await terminal.ask("WebhookService/ListWebhooks", organization_id="acme")


async def test_audit_trail(terminal: Terminal) -> None:
    """What was done to a key, and who has tried it since, is shown."""
    await terminal.ask("OrganizationService/CreateOrganization", organization_id="acme", name="Acme")
    created = await terminal.ask("KeyService/CreateKey", organization_id="acme", name="ci")
    key_id = created["key"]["id"]
    await terminal.ask("KeyService/RevokeKey", key_id=key_id, reason="leaked")
    assert "REVOKED" == await terminal.outcome(created["token"], client_ip="192.0.2.7")
    listed = await terminal.ask("AuditService/ListAuditEvents", organization_id="acme", entity_id=key_id)
    assert [("2", "leaked"), ("1", "")] == [
        (str(each["after"]["version"]), each["after"]["revoke_reason"]) for each in listed["events"]
    ]

    async def is_shown() -> bool:
        shown = await terminal.ask("AuditService/ListSuspiciousUse", organization_id="acme")
        return [("192.0.2.7", key_id, "1")] == [
            (each["source"], each["key_id"], each["count"]) for each in shown.get("uses", ())
        ]

    await eventually(is_shown)


async def test_mistakes_are_told_clearly(terminal: Terminal) -> None:
    """Each mistake of a newcomer is answered with a reason for programs and a sentence that says what to do."""
    await terminal.ask("OrganizationService/CreateOrganization", organization_id="acme", name="Acme")
    key_id = (await terminal.ask("KeyService/CreateKey", organization_id="acme", name="ci"))["key"]["id"]
    await terminal.ask("KeyService/RevokeKey", key_id=key_id)
    mistakes: list[tuple[str, dict[str, Any], str, str]] = [
        ("KeyService/CreateKey", {"name": "x"}, "INVALID_FIELD", "organization_id: must be named"),
        ("KeyService/CreateKey", {"organization_id": "acme"}, "INVALID_FIELD", "name: must be at least 1"),
        ("KeyService/CreateKey", {"organization_id": "nobody", "name": "x"}, "ORGANIZATION_NOT_FOUND", "nobody"),
        (
            "KeyService/CreateKey",
            {"organization_id": "acme", "name": "x", "permissions": ["fly"]},
            "SCOPE_UNKNOWN",
            "see ListScopes",
        ),
        (
            "KeyService/CreateKey",
            {"organization_id": "acme", "name": "x", "allowed_cidrs": ["10.0.0.1/8"]},
            "INVALID_FIELD",
            "did you mean 10.0.0.0/8?",
        ),
        ("KeyService/GetKey", {"key_id": "nonsense"}, "INVALID_FIELD", "must be the id of a key"),
        ("KeyService/ToggleKey", {"key_id": key_id}, "KEY_REVOKED", "create another"),
        ("KeyService/RotateKey", {"key_id": key_id}, "KEY_REVOKED", "create another"),
        ("OrganizationService/CreateOrganization", {"organization_id": "acme", "name": "x"}, "ORGANIZATION_EXISTS", ""),
    ]

    for method, request, reason, advice in mistakes:
        told = await terminal.fail(method, **request)
        assert f'"reason":"{reason}"' in told.replace(" ", ""), method
        assert advice in told
