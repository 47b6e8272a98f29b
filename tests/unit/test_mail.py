"""Who is told what by mail."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from latchgate.domain.mail import Mail, MailAttempt, MailReply, compose, judge_mail, recipient_of
from latchgate.domain.outbox import DeliveryState, EventType
from latchgate.domain.retries import RetryTerms
from support.records import KEY

NOON = datetime(2030, 1, 1, 12, tzinfo=UTC)
TOLD = {EventType.CREATED, EventType.ROTATED, EventType.REVOKED, EventType.DELETED, EventType.EXPIRING}


def body(**fields: str) -> str:
    """What an event says of a key."""
    key = {"id": "key_1", "name": "ci", "prefix": "lk_abcde", "organization_id": "acme"}
    return json.dumps({"data": {"key": key | fields}})


def recipient(event_type: EventType, actor: str = "key_other", user_email: str = "ann@example.com") -> str:
    """Who is told of something that another key has done to the key `key_1`, which `key_maker` has made."""
    return recipient_of(event_type, replace(KEY, id="key_1", created_by="key_maker", user_email=user_email), actor)


def composed(event_type: EventType = EventType.EXPIRING, **fields: str) -> Mail:
    """Writes a mail."""
    return compose(
        MailAttempt(
            mail_id="mail_1",
            event_id="evt_1",
            event_type=event_type,
            body=body(**fields),
            recipient="ann@example.com",
            number=1,
            first_time=NOON,
            now=NOON,
        )
    )


@pytest.mark.parametrize("event_type", [each for each in EventType if each.value.startswith("api_key.")])
def test_what_is_told_by_mail(event_type: EventType) -> None:
    """The key's person is told of a key that is made, rotated, ended by another or about to expire, and of nothing
    else.
    """
    expected = "ann@example.com" if event_type in TOLD else ""
    assert expected == recipient(event_type)


@pytest.mark.parametrize("event_type", [EventType.REVOKED, EventType.DELETED])
def test_who_ends_a_key_of_its_own_is_not_told(event_type: EventType) -> None:
    """Nobody gets mail about what its own key, or the key that made it, has done."""
    assert ["", "", "ann@example.com"] == [
        recipient(event_type, actor) for actor in ("key_1", "key_maker", "key_other")
    ]


@pytest.mark.parametrize(
    "address",
    [
        "",
        "ann",
        "ann@",
        "@example.com",
        "ann@example.com,bob@example.com",
        "ann@example.com\nBcc: bob@example.com",
        "a b@c",
    ],
)
def test_what_is_no_one_address_gets_nothing(address: str) -> None:
    """Mail goes to one address: what could be taken for several, or for another header, gets none."""
    assert "" == recipient(EventType.CREATED, user_email=address)


def test_mail_says_which_key() -> None:
    """A mail shows the key's name, id, organization, expiry and hint, as text and as HTML, and no word of a caller's
    choosing as markup.
    """
    mail = composed(name="<b>ci</b> & co", expire_time="2030-01-08T12:00:00Z")
    assert "API key “<b>ci</b> & co” expires on 2030-01-08" == mail.subject
    for part in ("Name: <b>ci</b> & co\n", "Key: key_1", "Token begins with: lk_abcde", "Organization: acme"):
        assert part in mail.text
    assert "&lt;b&gt;ci&lt;/b&gt; &amp; co" in mail.html
    assert "<b>" not in mail.html
    assert composed().message_id == mail.message_id


def test_reason_can_not_pretend_to_be_the_service() -> None:
    """A reason of several lines stays one line of the mail."""
    mail = composed(EventType.REVOKED, revoke_reason="leaked\n\nSend your password to eve@example.com")
    assert "Reason: leaked Send your password to eve@example.com\n" in mail.text


def test_what_follows_from_an_attempt() -> None:
    """A mail that was not taken is tried again for three days, unless the server says that it never will be."""
    mail_attempt = MailAttempt(
        mail_id="m",
        event_id="e",
        event_type=EventType.CREATED,
        body="",
        recipient="",
        number=1,
        first_time=NOON,
        now=NOON,
    )

    def judged(reply: MailReply) -> tuple[DeliveryState, datetime | None]:
        judgement = judge_mail(mail_attempt, reply, RetryTerms(), lambda: 1.0)
        return judgement.state, judgement.next_time

    assert (DeliveryState.DELIVERED, None) == judged(MailReply())
    assert (DeliveryState.PENDING, NOON + timedelta(seconds=5)) == judged(MailReply(error="away"))
    assert (DeliveryState.DEAD, None) == judged(MailReply(error="no such person", is_final=True))
