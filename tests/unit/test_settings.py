"""Settings on their way to another process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from latchgate.config import PREFIX, as_variables, load


def test_settings_are_the_same_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings written down as variables are read as the same; what the environment said before is not, all else is."""
    settings = load(
        database_url="postgresql://user:p%40ss@host/name?sslmode=disable",
        root_token="root-token-0123456789-0123456789-ab",
        tls_cert=Path("cert.pem"),
        tls_key=Path("key.pem"),
        allow_plaintext=True,
        validate_access="authenticated",
        drain_seconds=0.25,
        workers=3,
        log_format="json",
        webhook_private_networks="10.0.0.0/8,fd00::/8",
        expiry_notice_days="30,7",
        smtp_host="smtp.example.com",
        smtp_from="Latchgate <keys@example.com>",
        smtp_tls="tls",
        smtp_user="latchgate",
        smtp_password="p%40ss",
    )
    variables = as_variables(settings, {"PATH": "/bin", "LATCHGATE_TAG_KEY": "x" * 40, "LATCHGATE_WORKERS": "9"})
    assert "/bin" == variables["PATH"]
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert settings == load()
