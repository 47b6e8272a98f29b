"""Every SQL constant of the outbox against the migrated schema."""

from __future__ import annotations

from latchgate.storage.postgres import Database
from support.statements import OUTBOX, prepared, statements

WEBHOOK_COLUMNS = {
    "id", "organization_id", "url", "event_types", "enabled", "disable_time", "disable_reason", "failing_since",
    "old_secret_end_time", "created_by", "create_time", "update_time", "version",
}  # fmt: skip
DELIVERY_COLUMNS = {
    "id", "webhook_id", "organization_id", "event_id", "event_type", "subject", "state", "attempts", "create_time",
    "next_time", "last_time", "last_status", "last_error", "last_duration", "done_time",
}  # fmt: skip

# What each constant takes and gives, as PostgreSQL understands it.
STATEMENTS: dict[str, tuple[str, set[str]]] = {
    "EVENT_INSERT": ("text[] text[] text[] text[] text[] text[]", set()),
    "EVENT_DISPATCH": ("int8 bool int8", {"count"}),
    "OUTBOX_DUE": ("", {"events", "deliveries", "mails"}),
    "EVENT_INSERT_FOR_ONE": ("text text text text text text", {"id"}),
    "DELIVERY_TAKE": (
        "int8 interval int8 text[] int8[]",
        {
            "id",
            "webhook_id",
            "organization_id",
            "event_type",
            "attempts",
            "tries",
            "first_time",
            "event_id",
            "body",
            "url",
            "sealed_secret",
            "old_sealed_secret",
            "now",
        },
    ),
    "DELIVERY_FINISH": ("text int4 text timestamptz int4 text interval", {"webhook_id", "subject"}),
    "DELIVERY_PUT_OFF": ("text text text timestamptz", set()),
    "DELIVERY_GIVE_UP": ("int8", set()),
    "WEBHOOK_FAILED": ("text", set()),
    "WEBHOOK_DID_WELL": ("text", set()),
    "WEBHOOK_DISABLE": ("text bool interval", {"id"}),
    "WEBHOOK_GET": ("text", WEBHOOK_COLUMNS),
    "WEBHOOK_LOCK": ("text", {"?column?"}),
    "WEBHOOK_LIST": ("text text int8", WEBHOOK_COLUMNS),
    "WEBHOOK_COUNT": ("text", {"count"}),
    "WEBHOOK_INSERT": ("text text text text[] text bytea", set()),
    "WEBHOOK_UPDATE": ("text text text[] bool timestamptz text timestamptz", set()),
    "WEBHOOK_DELETE": ("text", set()),
    "WEBHOOK_ROTATE": ("text bytea interval", set()),
    "DELIVERY_GET": ("text", DELIVERY_COLUMNS),
    "DELIVERY_LIST": ("text text text text int8", DELIVERY_COLUMNS),
    "DELIVERY_LIST_OF_WEBHOOK": ("text text text text int8 text", DELIVERY_COLUMNS),
    "DELIVERY_REVIVE": ("text text int8", set()),
    "MAIL_TAKE": ("int8 interval", {"id", "recipient", "attempts", "first_time", "event_id", "type", "body", "now"}),
    "MAIL_FINISH": ("text int4 text timestamptz text", set()),
    "EXPIRY_DUE": ("text[] interval[] interval", {"exists"}),
    "EXPIRY_SCAN_BEGIN": ("text interval", set()),
    "EXPIRY_SCAN": ("text interval int8", {"count"}),
    "KEY_NOTE_FIRST_USED": ("int8[]", set()),
    "NOTICE_EXISTS": ("", {"exists"}),
    "NOTICE_TAKE": ("int8", {"key_id", "kind", "expire_time"}),
    "DELIVERY_FORGET": ("interval int8", set()),
    "DELIVERY_FORGET_ENDED": ("int8", set()),
    "NOTICE_FORGET": ("interval int8", set()),
    "MAIL_FORGET": ("interval int8", set()),
    "EVENT_FORGET": ("interval int8", set()),
    "WEBHOOK_FORGET": ("", set()),
    "OUTBOX_FIGURES": ("", {"deliveries", "mails", "oldest_s", "disabled"}),
}


async def test_every_statement_fits_the_schema(database: Database) -> None:
    """Each constant can be prepared against the migrated schema, takes what its callers pass and gives what they read.
    A constant that is added without an entry in this table fails here.
    """
    assert STATEMENTS == await prepared(database, statements()[OUTBOX])
