"""KeyService: each method converts, calls one use case, and converts back."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from apikeys.v1 import key_service_pb2 as pb
from latchgate.domain import access
from latchgate.domain.catalogue import ScopeManager
from latchgate.domain.errors import InvalidFieldError
from latchgate.domain.keys import KeyManager
from latchgate.domain.model import Caller, Scope, Verdict
from latchgate.domain.validation import Validator
from latchgate.observers import OutcomeObserver
from latchgate.rpc import convert
from latchgate.rpc.answers import AnswerWriter
from latchgate.rpc.pages import PageTokens, fitting, page_size

MAX_BATCH = 100


class KeyService:
    """Serves apikeys.v1.KeyService."""

    def __init__(
        self,
        *,
        keys: KeyManager,
        scopes: ScopeManager,
        validator: Validator,
        pages: PageTokens,
        outcomes: OutcomeObserver,
        answers: AnswerWriter,
    ) -> None:
        """Takes the use cases, who is told of outcomes, and who writes answers of Validate."""
        self._answers = answers
        self._keys = keys
        self._scopes = scopes
        self._validator = validator
        self._pages = pages
        self._outcomes = outcomes

    async def create_key(self, request: pb.CreateKeyRequest, caller: Caller) -> pb.CreateKeyResponse:
        """Creates a key."""
        draft, request_id = convert.key_draft(request), convert.request_id(request.request_id)
        issued = await self._keys.create(caller, request.organization_id, draft, request_id)
        return pb.CreateKeyResponse(key=convert.key_message(issued.key), token=issued.token)

    async def get_key(self, request: pb.GetKeyRequest, caller: Caller) -> pb.GetKeyResponse:
        """Reads a key."""
        return pb.GetKeyResponse(key=convert.key_message(await self._keys.get(caller, request.key_id)))

    async def list_keys(self, request: pb.ListKeysRequest, caller: Caller) -> pb.ListKeysResponse:
        """Lists keys."""
        key_filter, size = convert.key_filter(request), page_size(request.page_size)
        # The own organization is the same list whether it is named or not.
        named = replace(key_filter, organization_id=key_filter.organization_id or caller.organization_id)
        listing = ("keys", caller.organization_id, named)
        page = await self._keys.list(caller, key_filter, self._pages.read(listing, request.page_token), size)
        keys, is_cut = fitting(convert.key_message(key) for key in page.keys)
        return pb.ListKeysResponse(
            keys=keys,
            next_page_token=self._pages.make(listing, keys[-1].id) if page.more or is_cut else "",
        )

    async def update_key(self, request: pb.UpdateKeyRequest, caller: Caller) -> pb.UpdateKeyResponse:
        """Changes a key."""
        if not request.key.id:
            raise InvalidFieldError([("key.id", "must name the key to change")])
        changes = convert.key_changes(request)
        with convert.fields_of("key"):
            changed = await self._keys.update(caller, request.key.id, request.etag, changes)
        return pb.UpdateKeyResponse(key=convert.key_message(changed.key), effect=convert.effect_message(changed.effect))

    async def toggle_key(self, request: pb.ToggleKeyRequest, caller: Caller) -> pb.ToggleKeyResponse:
        """Switches a key."""
        active = request.active if request.HasField("active") else None
        changed = await self._keys.toggle(caller, request.key_id, active)
        return pb.ToggleKeyResponse(key=convert.key_message(changed.key), effect=convert.effect_message(changed.effect))

    async def rotate_key(self, request: pb.RotateKeyRequest, caller: Caller) -> pb.RotateKeyResponse:
        """Gives a key a new token."""
        grace, request_id = request.grace_period.ToTimedelta(), convert.request_id(request.request_id)
        issued = await self._keys.rotate(caller, request.key_id, grace, request_id)
        return pb.RotateKeyResponse(
            key=convert.key_message(issued.key), token=issued.token, effect=convert.effect_message(issued.effect)
        )

    async def revoke_key(self, request: pb.RevokeKeyRequest, caller: Caller) -> pb.RevokeKeyResponse:
        """Ends a key."""
        changed = await self._keys.revoke(caller, request.key_id, request.reason)
        return pb.RevokeKeyResponse(key=convert.key_message(changed.key), effect=convert.effect_message(changed.effect))

    async def delete_key(self, request: pb.DeleteKeyRequest, caller: Caller) -> pb.DeleteKeyResponse:
        """Ends and hides a key."""
        changed = await self._keys.delete(caller, request.key_id)
        return pb.DeleteKeyResponse(key=convert.key_message(changed.key), effect=convert.effect_message(changed.effect))

    async def undelete_key(self, request: pb.UndeleteKeyRequest, caller: Caller) -> pb.UndeleteKeyResponse:
        """Brings back a deleted key."""
        changed = await self._keys.undelete(caller, request.key_id)
        return pb.UndeleteKeyResponse(
            key=convert.key_message(changed.key), effect=convert.effect_message(changed.effect)
        )

    async def get_publishable_key(
        self, request: pb.GetPublishableKeyRequest, caller: Caller
    ) -> pb.GetPublishableKeyResponse:
        """Reads a publishable key with its token."""
        environment = convert.environment(request.environment)
        key, token = await self._keys.publishable(caller, request.organization_id, environment)
        return pb.GetPublishableKeyResponse(key=convert.key_message(key), token=token)

    async def list_scopes(self, request: pb.ListScopesRequest, caller: Caller) -> pb.ListScopesResponse:
        """Lists the catalogue."""
        scopes = await self._scopes.list(caller, request.organization_id)
        return pb.ListScopesResponse(scopes=[convert.scope_message(scope) for scope in scopes])

    async def create_scope(self, request: pb.CreateScopeRequest, caller: Caller) -> pb.CreateScopeResponse:
        """Adds a scope of an organization's own."""
        scope = Scope(name=request.name, description=request.description)
        created = await self._scopes.create(caller, request.organization_id, scope)
        return pb.CreateScopeResponse(scope=convert.scope_message(created))

    async def delete_scope(self, request: pb.DeleteScopeRequest, caller: Caller) -> pb.DeleteScopeResponse:
        """Removes a scope of an organization's own."""
        left = await self._scopes.delete(caller, request.organization_id, request.name)
        return pb.DeleteScopeResponse(scopes=[convert.scope_message(scope) for scope in left])

    async def validate(self, request: pb.ValidateRequest, caller: Caller | None) -> bytes:
        """Judges a token; gives a ValidateResponse as it is sent."""
        return self._answers.write(await self._judge(request, access.only_organization(caller)))

    async def batch_validate(self, request: pb.BatchValidateRequest, caller: Caller | None) -> pb.BatchValidateResponse:
        """Judges tokens, in the order in which they are given."""
        if len(request.requests) > MAX_BATCH:
            raise InvalidFieldError([("requests", f"must be at most {MAX_BATCH}; this is {len(request.requests)}")])
        verdicts = await self._judge_all(request.requests, access.only_organization(caller))
        answers = map(self._answers.write, verdicts)
        return pb.BatchValidateResponse(responses=[pb.ValidateResponse.FromString(answer) for answer in answers])

    async def _judge(self, request: pb.ValidateRequest, only_organization_id: str) -> Verdict:
        verdict = await self._validator.validate(
            request.token,
            required_permissions=request.required_permissions,
            client_ip=request.client_ip,
            cost=request.cost if request.HasField("cost") else 1,
            min_revision=request.min_revision,
            only_organization_id=only_organization_id,
        )
        self._outcomes.outcome(verdict.outcome)
        return verdict

    async def _judge_all(self, requests: Sequence[pb.ValidateRequest], only_organization_id: str) -> Sequence[Verdict]:
        """Judges together, so that the lookups go out as one; nothing goes on when one has failed."""
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._judge(each, only_organization_id)) for each in requests]
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        return [task.result() for task in tasks]
