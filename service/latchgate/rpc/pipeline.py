"""What happens around every call: parsing, the caller's identity, errors, one log line, metrics.

The handlers are bound without grpc's interceptor chain, which costs every call some microseconds and would hand the
caller over through a context: here a handler is given its request and its caller, and nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, replace
from time import perf_counter
from types import CoroutineType
from typing import Any, Final, NamedTuple

import grpc
import structlog
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import status_pb2

from latchgate.domain.callers import caller_of
from latchgate.domain.errors import StorageUnavailableError
from latchgate.domain.logins import Login
from latchgate.domain.model import Call, Caller, Visitor
from latchgate.domain.ports import AuditTrail
from latchgate.domain.validation import Validator
from latchgate.observers import CallObserver, Tally
from latchgate.rpc.audited import call_of, entry_of
from latchgate.rpc.calls import Context, RunningCall, abort, answer_due_s, bearer_token
from latchgate.rpc.peers import peer_address
from latchgate.rpc.requests import check_rules, parse

ManagementHandler = Callable[[Any, Any, Caller], Awaitable[Message]]
VisitedHandler = Callable[[Any, Any, Visitor], Awaitable[Message]]
StreamHandler = Callable[[Any], Callable[[Any, Caller], Awaitable[Message]]]
"""Begins a call of a service, and gives what answers its requests, one after the other."""
ValidationHandler = Callable[[Any, Any, Caller | None], Awaitable[Message | bytes]]
Behaviour = Callable[[bytes, Context], Awaitable[Message | bytes]]
StreamBehaviour = Callable[[AsyncIterator[bytes], Context], Awaitable[None]]
FromMemory = Callable[[bytes, float], bytes | Coroutine[Any, Any, bytes] | None]
"""Gives the answer to a request, both in bytes, from memory, or what is to be awaited for it; None, or an error, if the
request has to be gone into first.

It is told at what time by the validator's clock the request was there.
"""
Refuse = Callable[[status_pb2.Status, bytes, Context], bytes | None]
"""Gives the answer to a request that says an error in the words of a protocol; None where the call ends with it."""

_OK: Final = grpc.StatusCode.OK.name
_log = structlog.get_logger("latchgate.rpc")


Refused = Callable[[BaseException, bytes, Context, float], Awaitable[Message | bytes]]
"""Tells the caller of an error that a request has ended with, after so many seconds; or raises it anew."""


class Hot(NamedTuple):
    """A method of the hot path: what answers it, and what tells of an error."""

    behave: Behaviour
    refused: Refused


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """What stands behind the handlers: who judges the callers' tokens, and the services by their full names.

    `recalls` answer from memory, where they can, by the full names of their methods; `boottime` is the clock by which
    callers wait. Every call of management leaves something in the `trail`. A `login` judges JWTs, where there is an
    issuer.
    """

    validator: Validator
    trail: AuditTrail
    recalls: Mapping[str, FromMemory]
    boottime: Callable[[], float]
    services: Mapping[str, object]
    login: Login | None = None


class Pipeline:
    """Wraps handlers into behaviours that grpc can call with bytes.

    The server listens before its database is there; until `connect` is called every call is UNAVAILABLE.
    """

    def __init__(self, observer: CallObserver, *, is_validate_open: bool) -> None:
        """Takes who is told of calls, and whether Validate may be called by anyone."""
        self._observer = observer
        self._is_validate_open = is_validate_open
        self._backend: Backend | None = None
        # What is answered from memory, by method.
        self._recalling: dict[str, _Recalling] = {}
        self._gate: asyncio.Event | None = None
        # How many calls have come since `hold`.
        self.held = 0

    def connect(self, backend: Backend) -> None:
        """Lets calls through."""
        self._backend = backend
        if self._is_validate_open and self._gate is None:
            for method, recalling in self._recalling.items():
                recalling.recall, recalling.clock = backend.recalls[method], backend.validator.clock

    def hold(self) -> None:
        """Makes all calls that come from now on wait until `release`."""
        for recalling in self._recalling.values():
            recalling.recall = _never
        self._gate = asyncio.Event()

    def release(self) -> None:
        """Lets the calls go on that wait, and those that come."""
        if self._gate is not None:
            self._gate.set()

    async def _admitted(self) -> Backend:
        """Gives what answers a call. Raises StorageUnavailableError."""
        if self._gate is not None:
            self.held += 1
            await self._gate.wait()
        if self._backend is None:
            raise StorageUnavailableError("the service is starting and waits for its database")
        return self._backend

    def management(self, method: MethodDescriptor, handler: ManagementHandler) -> Behaviour:
        """Wraps a handler whose callers must be known and whose calls are logged."""
        name, service, request_type = _described(method)

        async def behave(raw: bytes, context: Context) -> Message:
            call = RunningCall(name, context, perf_counter())
            request = None
            try:
                backend = await self._admitted()
                call.caller = await _identify(backend, context, call_of(name, context))
                request = parse(request_type, raw)
                check_rules(request)
                answer = await handler(backend.services[service], request, call.caller)
                if not call.caller.call.is_recorded:
                    # Nobody is told anything that leaves no trace.
                    await backend.trail.record_audit(call.caller, entry_of(call.caller, request, answer))
            except BaseException as error:
                status = call.refuse(error)
                if status is None:
                    raise
                if call.caller is not None:
                    await self._record_refusal(backend.trail, call, request)
            else:
                return answer
            finally:
                # Before the caller is told: who reads of an incident finds it in the log.
                call.log()
                self._observer.finished(name, call.code.name, call.seconds())
            return await abort(context, status)

        return behave

    def visited(self, method: MethodDescriptor, handler: VisitedHandler) -> Behaviour:
        """Wraps a handler that finds out by the request who calls, if anyone in particular.

        As soon as it knows, the call is the caller's in the log and the audit trail; one of nobody leaves no trace in
        these.
        """
        name, service, request_type = _described(method)

        async def behave(raw: bytes, context: Context) -> Message:
            call = RunningCall(name, context, perf_counter())
            visitor, request = None, None
            try:
                backend = await self._admitted()
                visitor = Visitor(
                    client_ip=peer_address(context.peer()),
                    answer_by_s=answer_due_s(context, backend.boottime()),
                    call=call_of(name, context),
                )
                request = parse(request_type, raw)
                check_rules(request)
                answer = await handler(backend.services[service], request, visitor)
                call.caller = visitor.caller
                if call.caller is not None and not visitor.call.is_recorded:
                    await backend.trail.record_audit(call.caller, entry_of(call.caller, request, answer))
            except BaseException as error:
                call.caller = visitor.caller if visitor else None
                status = call.refuse(error)
                if status is None:
                    raise
                if call.caller is not None:
                    await self._record_refusal(backend.trail, call, request)
            else:
                return answer
            finally:
                call.log()
                self._observer.finished(name, call.code.name, call.seconds())
            return await abort(context, status)

        return behave

    async def _record_refusal(self, trail: AuditTrail, call: RunningCall, request: Message | None) -> None:
        """Records a refused call, as far as the trail can be written: the call ends as it would have."""
        caller = call.caller
        if caller is None:
            return
        try:
            await trail.record_audit(caller, entry_of(caller, request, code=call.code.name, reason=call.reason))
        except Exception as error:  # noqa: BLE001 - whatever it is, the caller is told of the first one
            self._observer.unrecorded()
            _log.warning("refusal_not_recorded", request_id=caller.call.request_id, error=type(error).__name__)

    def _check_going_on(self, gate: asyncio.Event | None) -> None:
        """Demands that no stop has begun since the gate was this one. Raises StorageUnavailableError."""
        if self._gate is not gate:
            raise StorageUnavailableError("the service stops; send what was not answered in another call")

    def streaming(self, method: MethodDescriptor, handler: StreamHandler) -> StreamBehaviour:
        """Wraps a handler whose callers send requests one after the other, and are sent a response to each.

        A request is not read before the one ahead of it is answered, so that there is never more than one at hand. Each
        is for its caller what a call of its own would be: who has lost a permission meanwhile, or its key, is refused
        at the next one. Only the first counts in the caller's rate limit. A server that stops takes no further ones.
        """
        name, service, request_type = _described(method)

        async def behave(requests: AsyncIterator[bytes], context: Context) -> None:
            call = RunningCall(name, context, perf_counter())
            request = None
            try:
                backend = await self._admitted()
                came = call_of(name, context)
                call.caller = await _identify(backend, context, came)
                answer, gate = handler(backend.services[service]), self._gate
                async for raw in requests:
                    self._check_going_on(gate)
                    call.count_request()
                    # Each leaves a trace of its own, under the one id of the call.
                    call.caller = await _identify(backend, context, replace(came, is_recorded=False), cost=0)
                    request = parse(request_type, raw)
                    check_rules(request)
                    response = await answer(request, call.caller)
                    if not call.caller.call.is_recorded:
                        await backend.trail.record_audit(call.caller, entry_of(call.caller, request, response))
                    await context.write(response)
                # The requests of a call that was given up end like those of one that is complete; the difference is
                # told a moment later.
                await asyncio.sleep(0)
                if request is None:
                    await backend.trail.record_audit(call.caller, entry_of(call.caller, None))
            except BaseException as error:
                status = call.refuse(error)
                if status is None:
                    raise
                if call.caller is not None:
                    await self._record_refusal(backend.trail, call, request)
            else:
                return
            finally:
                call.log()
                self._observer.finished(name, call.code.name, call.seconds())
            await abort(context, status)

        return behave

    def validation(self, method: MethodDescriptor, handler: ValidationHandler, refuse: Refuse | None = None) -> Hot:
        """Wraps a handler of the hot path: no rules but its own, no log line for an answer.

        One that can `refuse` in its own words is given what came as bytes, to read it in its own way.
        """
        name, service, request_type = _described(method)

        async def behave(raw: bytes, context: Context) -> Message | bytes:
            start_s = perf_counter()
            try:
                backend = await self._admitted()
                caller = None if self._is_validate_open else await _key_holder(backend, context, Call(), cost=0)
                request = raw if refuse else parse(request_type, raw)
                answer = await handler(backend.services[service], request, caller)
            except BaseException as error:  # noqa: BLE001 - what is not told of is raised anew
                return await refused(error, raw, context, perf_counter() - start_s)
            self._observer.finished(name, _OK, perf_counter() - start_s)
            return answer

        async def refused(error: BaseException, raw: bytes, context: Context, seconds: float) -> Message | bytes:
            call = RunningCall(name, context, perf_counter() - seconds)
            status = call.refuse(error)
            self._observer.finished(name, call.code.name, seconds)
            if call.code is grpc.StatusCode.INTERNAL:
                call.log()
            if status is None:
                raise error
            answer = refuse(status, raw, context) if refuse else None
            return answer if answer is not None else await abort(context, status)

        return Hot(behave, refused)

    def recalling(self, method: MethodDescriptor, hot: Hot) -> Behaviour:
        """Has a method of the hot path answered from memory, and by its own behaviour only where that takes more."""
        recalling = self._recalling[method.full_name] = _Recalling(self._observer.tally(method_name(method)), hot)
        return recalling


def _never(_raw: bytes, _came_s: float) -> bytes | None:
    """Remembers nothing: before there is anything to answer from, and once calls are held."""
    return None


class _Recalling:
    """The behaviour of a method of the hot path: what is answered from memory now, and the clock by which it is.

    grpc asks at every call whether what it was given is a function whose calls are to be awaited; the answer is there
    soonest if it is a coroutine itself. This one is none: it only says so.
    """

    # That this is not what it is, is the point: type checkers are right to object.
    __class__ = CoroutineType  # type: ignore[assignment]

    def __init__(self, tally: Tally, hot: Hot) -> None:
        self.recall: FromMemory = _never
        # In seconds.
        self.clock: Callable[[], float] = perf_counter
        self._tally = tally
        self._hot = hot

    async def __call__(self, raw: bytes, context: Context) -> Message | bytes:
        clock = self.clock
        # Read once for how long the call takes and for the time as of which it is judged.
        came_s = clock()
        try:
            answer = self.recall(raw, came_s)
        except Exception:  # noqa: BLE001 - what it is, is found out and told below
            answer = None
        if not isinstance(answer, bytes):
            if answer is None:
                return await self._hot.behave(raw, context)
            try:
                answer = await answer
            except BaseException as error:  # noqa: BLE001 - what is not told of is raised anew
                return await self._hot.refused(error, raw, context, clock() - came_s)
        seconds = clock() - came_s
        tally = self._tally
        if seconds < tally.quick_s:
            tally.quick += 1
            tally.seconds += seconds
        else:
            tally.slow(seconds)
        return answer


def method_name(method: MethodDescriptor) -> str:
    """Gives the name of a method for people, in logs and metrics."""
    return f"{method.containing_service.name}/{method.name}"


def _described(method: MethodDescriptor) -> tuple[str, str, type[Message]]:
    """Gives the name of a method for people, the full name of its service, and the class of its requests."""
    return method_name(method), method.containing_service.full_name, GetMessageClass(method.input_type)


async def _identify(backend: Backend, context: Context, call: Call, cost: int = 1) -> Caller:
    """Finds out who calls, with a key or with a JWT of the issuer."""
    if backend.login is None or not backend.login.takes(token := bearer_token(context)):
        return await _key_holder(backend, context, call, cost)
    answer_by_s = answer_due_s(context, backend.boottime())
    return await backend.login.caller(token, client_ip=call.peer, answer_by_s=answer_by_s, call=call)


async def _key_holder(backend: Backend, context: Context, call: Call, cost: int) -> Caller:
    """Finds out who calls with a key. Who asks about others' tokens is not charged: it would be a limit on them all."""
    client_ip = peer_address(context.peer())
    verdict = await backend.validator.validate(bearer_token(context), client_ip=client_ip, cost=cost)
    return caller_of(verdict, answer_due_s(context, backend.boottime()), call)
