"""Validate: each outcome, through the real server and database."""

from __future__ import annotations

from support.service import RunningService


async def test_new_key_is_valid(service: RunningService) -> None:
    """A key is VALID as soon as the call that created it has returned, and Validate says whose it is."""
    await service.create_organization("acme")
    created = await service.create_key("acme", name="checkout", user_id="u1", user_email="u1@example.com")

    answer = await service.validate(created.token)

    assert "VALID" == await service.outcome(created.token)
    assert created.key.id == answer.key_id
    assert "acme" == answer.organization_id
    assert ("checkout", "u1", "u1@example.com") == (answer.key_name, answer.user_id, answer.user_email)
