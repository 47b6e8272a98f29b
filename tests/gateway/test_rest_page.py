"""The commands of docs/rest.md, run through the real Envoy."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any, Final

import pytest
from google.api import annotations_pb2

from support.edge import edge as run_edge
from support.envoy import needs_envoy
from support.service import ROOT_TOKEN, run_service
from support.transport import METHODS

pytestmark = [pytest.mark.asyncio(loop_scope="session"), needs_envoy]

PAGE: Final = Path(__file__).parents[2] / "docs" / "rest.md"
COMMANDS: Final = re.findall(r"^\$ (curl .*)\n(\{.*\})$", PAGE.read_text(), re.MULTILINE)


def read(command: str, variables: dict[str, str]) -> tuple[str, str, str | None, str]:
    """Reads a command as a shell and curl do: method, path, body, and the token by which the caller says who it is."""
    for name, value in variables.items():
        command = command.replace(f"${name}", value)
    words = shlex.split(command)[1:]
    method, url, body, token = "", "", None, ""
    while words:
        match words.pop(0):
            case "-X":
                method = words.pop(0)
            case "-d":
                body = words.pop(0)
            case "-H":
                name, _, token = words.pop(0).partition(": Bearer ")
                assert "Authorization" == name
            case word:
                url = word
    return method or ("POST" if body else "GET"), url, body, token


def is_like(shown: Any, got: Any) -> bool:
    """Says whether an answer has the fields that are shown; what is made anew each time may have another value."""
    if isinstance(shown, dict):
        return all(name in got and is_like(value, got[name]) for name, value in shown.items())
    if isinstance(shown, list):
        return all(any(is_like(each, other) for other in got) for each in shown)
    is_made = isinstance(shown, str) and re.match(r"(key|whk)_0|lk_|whsec_|v\d|\d+$|\d{4}-|eyJ|[\w-]{43}$", shown)
    return bool(is_made) or bool(shown == got)


async def test_commands_of_the_page(database_url: str, tmp_path: Path) -> None:
    """Each command of the page does what the page shows, and there is one for every method."""
    variables = {"API": "", "AUTH": f"Authorization: Bearer {ROOT_TOKEN}"}
    called = set()
    async with run_service(database_url) as service, run_edge(tmp_path, service.address) as edge:
        await service.create_organization("acme")
        for command, shown in COMMANDS:
            method, path, body, token = read(command, variables)
            raw = body.encode() if body else None
            answer = await edge.call(
                method,
                path,
                raw,
                token=token,
                headers={"content-type": "application/x-www-form-urlencoded"} if raw else {},
            )
            assert 200 == answer.status, (command, answer.text)
            assert is_like(json.loads(shown), answer.json), (command, answer.text)
            called.add((method, path.partition("?")[0]))
            if "TOKEN" not in variables:
                variables |= {"TOKEN": answer.json["token"], "KEY": answer.json["key"]["id"]}
            if "batch" in (body or ""):
                variables["BATCH"] = answer.json["token"]
            if "refresh_token" in answer.json:
                variables["REFRESH"] = answer.json["refresh_token"]
            if method == "POST" and path == "/v1/webhooks":
                variables["HOOK"] = answer.json["webhook"]["id"]

    for name, descriptor in METHODS.items():
        rule = descriptor.GetOptions().Extensions[annotations_pb2.http]
        verb = str(rule.WhichOneof("pattern"))
        template = re.sub(r"\\\{[^}]*\\\}", "[^/]+", re.escape(getattr(rule, verb)))
        assert any(verb.upper() == method and re.fullmatch(template, path) for method, path in called), name
