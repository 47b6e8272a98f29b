"""Validation: a token and what a request needs become a verdict."""

from __future__ import annotations

import re
from dataclasses import replace
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_network
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from latchgate.domain.errors import (
    InvalidFieldError,
    RevisionUnknownError,
    StorageUnavailableError,
)
from latchgate.domain.floods import ForeignLookupBudget, Patience
from latchgate.domain.model import (
    KeyRecord,
    Lookup,
    Outcome,
    RateState,
    Verdict,
)
from latchgate.domain.rules import normal_cidrs
from latchgate.domain.suspicion import Suspect, SuspicionCounter
from latchgate.domain.token import digest
from latchgate.domain.validation import Need, Validator
from support.limits import CountingAlone
from support.records import INSTANT_S, KEY_RECORD, NOW_S, ManualClock, bound_to, granting
from support.scenes import (
    AFFLICTIONS,
    CLIENT_IP,
    NEEDED,
    ORDER,
    RECORD,
    REVISION,
    TOKEN,
    TOKENS,
    Scene,
    scene_of,
    scene_with,
)

CONTRACT = Path(__file__).parents[2] / "protos/apikeys/v1/key_service.proto"

NAMELESS = ORDER[:5]
"""Outcomes that do not say whose key it is."""


def test_order_is_the_documented_one() -> None:
    """The contract tells callers in which order the checks are made; the tests below hold the service to that order."""
    comment = " ".join(line.strip(" /") for line in CONTRACT.read_text().splitlines() if line.startswith("//"))
    documented = re.search(r"Checked in the order ([A-Z_, ]+);", comment)
    assert documented is not None
    assert ", ".join(outcome.name for outcome in ORDER) == documented[1]


async def test_valid() -> None:
    """A good token is answered with everything that a gateway may want to know."""
    verdict = await scene_of().validate()
    rate = RateState(allowed=True, limit=60, remaining=3, reset_after_s=4)
    assert Verdict(outcome=Outcome.VALID, revision=REVISION, now_s=NOW_S, record=RECORD, rate=rate) == verdict


@pytest.mark.parametrize(
    "outcomes",
    [each for count in range(1, len(ORDER) + 1) for each in combinations(ORDER, count)],
    ids=lambda outcomes: "+".join(outcome.value for outcome in outcomes),
)
async def test_the_first_reason_in_order_is_the_answer(outcomes: tuple[Outcome, ...]) -> None:
    """Of all the reasons to refuse a token, the first in the documented order is given."""
    verdict = await scene_with(*outcomes).validate()
    assert outcomes[0] is verdict.outcome


@pytest.mark.parametrize("outcome", NAMELESS)
async def test_nameless_outcomes(outcome: Outcome) -> None:
    """Whoever holds a token that is no longer good does not learn from it whose it was."""
    verdict = await scene_with(outcome).validate()
    assert Verdict(outcome=outcome, revision=REVISION) == verdict


@pytest.mark.parametrize("outcome", [each for each in ORDER if each not in NAMELESS])
async def test_outcomes_with_identity(outcome: Outcome) -> None:
    """Where the token is good and the request is not, the gateway is told whose key it is, for its own records."""
    verdict = await scene_with(outcome).validate()
    assert (NOW_S, RECORD.key_id, RECORD.shown) == (
        verdict.now_s,
        verdict.record and verdict.record.key_id,
        verdict.record and verdict.record.shown,
    )


@pytest.mark.parametrize("outcome", ORDER)
async def test_refused_calls_leave_no_use(outcome: Outcome) -> None:
    """Being refused is no use of a key: an attacker's attempts do not hide that a key lies idle."""
    scene = scene_with(outcome)
    await scene.validate()
    assert [] == scene.usage.recorded


@pytest.mark.parametrize("outcome", ORDER)
async def test_refusals_are_counted(outcome: Outcome) -> None:
    """A refusal is taken note of once, with the outcome that was answered, where it is known whose token it was."""
    scene = scene_with(outcome)
    await scene.validate()
    expected = [] if outcome is Outcome.NOT_FOUND else [(RECORD.secret_id, outcome, NOW_S)]
    assert expected == scene.usage.refusals


async def test_what_is_hidden_from_a_caller_is_not_counted() -> None:
    """Whoever may not know of a token, and is told that there is none, leaves no trace in its usage."""
    scene = scene_of()
    verdict = await scene.validator.validate(TOKEN, only_organization_id="another")
    assert Outcome.NOT_FOUND is verdict.outcome
    assert ([], []) == (scene.usage.recorded, scene.usage.refusals)


@pytest.mark.parametrize("outcome", [each for each in ORDER if each is not Outcome.RATE_LIMITED])
async def test_refused_calls_are_not_charged(outcome: Outcome) -> None:
    """What is refused for any other reason never reaches the limiter: it can not use up a key's limit."""
    scene = scene_with(outcome)
    await scene.validate()
    assert [] == scene.limiter.asked


async def test_use_is_recorded_once() -> None:
    """A valid call is one use of its secret, at the database's time, and no refusal."""
    scene = scene_of()
    await scene.validate()
    assert [(RECORD.secret_id, NOW_S)] == scene.usage.recorded
    assert [] == scene.usage.refusals


async def test_limiter_is_asked_for_the_keys_limit() -> None:
    """A call is charged once, to the key, and so to all its tokens together, with the cost that it named."""
    scene = scene_of()
    await scene.validator.validate(TOKEN, required_permissions=NEEDED, client_ip=CLIENT_IP, cost=5)
    assert [(RECORD.key_id, 60, 5)] == scene.limiter.asked


async def test_default_cost_is_1() -> None:
    """A call that names no cost counts for one request."""
    scene = scene_of()
    await scene.validate()
    assert [(RECORD.key_id, 60, 1)] == scene.limiter.asked


async def test_keys_without_limit() -> None:
    """A key without a limit is not counted at all, and its answer holds no limit."""
    scene = scene_of(replace(RECORD, rate_limit_per_minute=0))
    scene.limiter.allowed = False
    verdict = await scene.validate()
    assert (Outcome.VALID, None) == (verdict.outcome, verdict.rate)
    assert [] == scene.limiter.asked


async def test_rate_limited_says_when_to_come_back() -> None:
    """A refusal for the rate carries the state of the limit."""
    verdict = await scene_with(Outcome.RATE_LIMITED).validate()
    assert RateState(allowed=False, limit=60, remaining=3, reset_after_s=4) == verdict.rate


async def test_waiting_for_the_limiter() -> None:
    """Where the limiter can not say, it is waited for and asked again, as often as it takes; the call counts once."""
    scene = scene_of()
    scene.limiter.hesitations = 2
    verdict = await scene.validator.validate(TOKEN, required_permissions=NEEDED, client_ip=CLIENT_IP, cost=5)
    assert Outcome.VALID is verdict.outcome
    assert [(RECORD.key_id, 60, 5)] * 2 == scene.limiter.waited
    assert [(RECORD.key_id, 60, 5)] == scene.limiter.asked
    assert [(RECORD.secret_id, NOW_S)] == scene.usage.recorded


@pytest.mark.parametrize("outcome", AFFLICTIONS)
async def test_keys_that_change_while_the_limiter_is_waited_for(outcome: Outcome) -> None:
    """A key that is ended or restricted while its call waits for the limiter is judged as it is then, from what memory
    or the database says then; and the call that is refused is not charged.
    """
    for is_in_memory in (False, True):
        scene = scene_of()
        scene.limiter.hesitations = 1
        scene.memory.known = Lookup(RECORD, NOW_S, REVISION) if is_in_memory else None

        def change(scene: Scene = scene) -> None:
            scene.memory.known = None
            scene.put(AFFLICTIONS[outcome](RECORD))

        scene.limiter.meanwhile = change
        assert outcome is (await scene.validate()).outcome
        assert ([], []) == (scene.limiter.asked, scene.usage.recorded)


@pytest.mark.parametrize("outcome", Outcome)
async def test_what_is_suspicious(outcome: Outcome) -> None:
    """Tokens that nobody has, that are revoked, or that come from where they may not, are counted by who sends them,
    with the key where there is one; nothing else is.
    """
    scene = scene_of() if outcome is Outcome.VALID else scene_with(outcome)
    address = "192.0.2.1" if outcome is Outcome.ADDRESS_DENIED else CLIENT_IP
    for _ in range(2):
        await scene.validator.validate(TOKEN, required_permissions=NEEDED, client_ip=address)
    whose = {
        Outcome.NOT_FOUND: ("", ""),
        Outcome.REVOKED: (RECORD.organization_id, RECORD.key_id),
        Outcome.ADDRESS_DENIED: (RECORD.organization_id, RECORD.key_id),
    }
    expected = [(Suspect(address, outcome, *whose[outcome]), 2)] if outcome in whose else []
    assert expected == scene.suspicion.take()


async def test_with_the_real_limiter() -> None:
    """A key is good for its limit a minute, and is so again when the time has come that it was told."""
    clock = ManualClock()
    scene = scene_of(replace(KEY_RECORD, rate_limit_per_minute=3))
    validator = Validator(
        tokens=TOKENS,
        keys=scene.reader,
        memory=scene.memory,
        limiter=CountingAlone(clock),
        usage=scene.usage,
        foreign=ForeignLookupBudget(clock),
        patience=Patience(clock),
        suspicion=SuspicionCounter(clock),
    )
    verdicts = [await validator.validate(TOKEN) for _ in range(4)]
    assert [Outcome.VALID] * 3 + [Outcome.RATE_LIMITED] == [verdict.outcome for verdict in verdicts]
    assert [2, 1, 0, 0] == [verdict.rate and verdict.rate.remaining for verdict in verdicts]
    assert verdicts[3].rate is not None
    clock.advance(verdicts[3].rate.reset_after_s)
    assert Outcome.VALID is (await validator.validate(TOKEN)).outcome
    assert 4 == len(scene.usage.recorded)


@pytest.mark.parametrize(
    ("ahead_s", "outcome"),
    [(-INSTANT_S, Outcome.EXPIRED), (0.0, Outcome.EXPIRED), (INSTANT_S, Outcome.VALID)],
)
async def test_expiry_boundary(ahead_s: float, outcome: Outcome) -> None:
    """A key is refused from the very instant of its expiry on, by the database's clock."""
    verdict = await scene_of(replace(RECORD, expire_s=NOW_S + ahead_s)).validate()
    assert outcome is verdict.outcome


@pytest.mark.parametrize(
    ("ahead_s", "outcome"),
    [(-INSTANT_S, Outcome.REVOKED), (0.0, Outcome.REVOKED), (INSTANT_S, Outcome.VALID)],
)
async def test_end_of_a_rotated_token(ahead_s: float, outcome: Outcome) -> None:
    """A token that a rotation replaced is refused from the very instant of its end on; before, it is good."""
    verdict = await scene_of(replace(RECORD, secret_end_s=NOW_S + ahead_s)).validate()
    assert outcome is verdict.outcome


async def test_a_rotated_token_of_an_expired_key_is_revoked() -> None:
    """A replaced token is answered as such, also when its key has expired since."""
    verdict = await scene_of(replace(RECORD, secret_end_s=NOW_S, expire_s=NOW_S, active=False)).validate()
    assert Outcome.REVOKED is verdict.outcome


@pytest.mark.parametrize(
    ("needed", "outcome"),
    [
        ((), Outcome.VALID),
        (("orders:read",), Outcome.VALID),
        (("orders:read", "invoices:write:all"), Outcome.VALID),
        (("orders:read", "orders:write"), Outcome.PERMISSION_DENIED),
        (("orders:write", "orders:read"), Outcome.PERMISSION_DENIED),
        (("invoices",), Outcome.PERMISSION_DENIED),
        (("*",), Outcome.PERMISSION_DENIED),
    ],
)
async def test_all_permissions_are_required(needed: tuple[str, ...], outcome: Outcome) -> None:
    """A request needs all of its permissions, and one that needs none is good for any key."""
    scene = scene_of(granting(KEY_RECORD, "orders:read", "invoices:*"))
    assert outcome is (await scene.validator.validate(TOKEN, required_permissions=needed)).outcome


@pytest.mark.parametrize(
    ("cidrs", "client_ip", "outcome"),
    [
        (("192.0.2.0/24",), "192.0.2.255", Outcome.VALID),
        (("192.0.2.0/24",), "192.0.3.0", Outcome.ADDRESS_DENIED),
        (("192.0.2.0/24", "198.51.100.7/32"), "198.51.100.7", Outcome.VALID),
        (("192.0.2.0/24", "198.51.100.7/32"), "198.51.100.8", Outcome.ADDRESS_DENIED),
        (("2001:db8::/32",), "2001:db8:ffff::1", Outcome.VALID),
        (("2001:db8::/32",), "2001:db9::1", Outcome.ADDRESS_DENIED),
        (("192.0.2.0/24",), "::ffff:192.0.2.1", Outcome.VALID),
        (("192.0.2.0/24",), "::ffff:c000:201", Outcome.VALID),
        (("192.0.2.0/24",), "::ffff:192.0.3.1", Outcome.ADDRESS_DENIED),
        (("192.0.2.0/24",), "::192.0.2.1", Outcome.ADDRESS_DENIED),
        (("0.0.0.0/0",), "2001:db8::1", Outcome.ADDRESS_DENIED),
        (("::/0",), "192.0.2.1", Outcome.ADDRESS_DENIED),
        (("192.0.2.0/24",), "", Outcome.ADDRESS_DENIED),
        (("0.0.0.0/0", "::/0"), "", Outcome.ADDRESS_DENIED),
        ((), "", Outcome.VALID),
        ((), "203.0.113.9", Outcome.VALID),
    ],
)
async def test_networks(cidrs: tuple[str, ...], client_ip: str, outcome: Outcome) -> None:
    """A key that is bound to networks is good within them alone; IPv4 that comes mapped into IPv6 is IPv4."""
    scene = scene_of(bound_to(KEY_RECORD, *cidrs))
    assert outcome is (await scene.validator.validate(TOKEN, client_ip=client_ip)).outcome


@st.composite
def networks_and_members(draw: st.DrawFn) -> tuple[IPv4Network | IPv6Network, str]:
    """Draws a network and an address in it, but for mapped IPv4 in an IPv6 network that is wider than all of IPv4."""
    member = draw(st.ip_addresses())
    mapped = isinstance(member, IPv6Address) and member.ipv4_mapped is not None
    shortest = 96 if mapped else 0
    return ip_network((member, draw(st.integers(shortest, member.max_prefixlen))), strict=False), str(member)


@given(drawn=networks_and_members())
@example(drawn=(ip_network("::ffff:192.0.2.0/120"), "::ffff:192.0.2.7"))
async def test_every_address_of_a_network_is_within(drawn: tuple[IPv4Network | IPv6Network, str]) -> None:
    """A network that a key was given admits all of its addresses, in the form in which it is stored."""
    network, member = drawn
    scene = scene_of(bound_to(KEY_RECORD, *normal_cidrs([str(network)])))
    assert Outcome.VALID is (await scene.validator.validate(TOKEN, client_ip=member)).outcome


MALFORMED_IPS = ["192.0.2.1:443", "192.0.2.0/24", "[2001:db8::1]", "localhost", "192.0.2.01", " 192.0.2.1", "\0"]


@pytest.mark.parametrize("client_ip", MALFORMED_IPS, ids=ascii)
async def test_malformed_address_of_a_bound_key(client_ip: str) -> None:
    """Where the address decides and can not be read, the caller is told of its mistake, and nothing is charged."""
    scene = scene_of()
    with pytest.raises(InvalidFieldError) as caught:
        await scene.validator.validate(TOKEN, client_ip=client_ip)
    assert ["client_ip"] == [field for field, _ in caught.value.violations]
    assert ([], []) == (scene.limiter.asked, scene.usage.recorded)


@pytest.mark.parametrize("client_ip", MALFORMED_IPS, ids=ascii)
async def test_malformed_address_elsewhere(client_ip: str) -> None:
    """Where the address decides nothing, its form does not matter: the token is judged all the same."""
    free = scene_of(KEY_RECORD)
    assert Outcome.VALID is (await free.validator.validate(TOKEN, client_ip=client_ip)).outcome
    revoked = scene_with(Outcome.REVOKED)
    assert Outcome.REVOKED is (await revoked.validator.validate(TOKEN, client_ip=client_ip)).outcome


async def test_tokens_are_looked_up_by_digest() -> None:
    """The reader is asked once, and never sees the token itself."""
    scene = scene_of()
    await scene.validate()
    assert [digest(TOKEN)] == scene.reader.asked


async def test_storage_failures_are_no_outcome() -> None:
    """When storage does not answer, neither is the token refused nor let through: the caller hears an error."""
    scene = scene_of()
    scene.reader.failure = StorageUnavailableError("the database does not answer")
    with pytest.raises(StorageUnavailableError):
        await scene.validate()
    assert ([], []) == (scene.limiter.asked, scene.usage.recorded)


@pytest.mark.parametrize("min_revision", [0, 1, REVISION])
async def test_revisions_that_were_reached(min_revision: int) -> None:
    """A state that holds the change asked for, or a later one, is answered from."""
    verdict = await scene_of(KEY_RECORD).validator.validate(TOKEN, min_revision=min_revision)
    assert (Outcome.VALID, REVISION) == (verdict.outcome, verdict.revision)


@pytest.mark.parametrize("record", [KEY_RECORD, None], ids=["found", "not found"])
async def test_revisions_that_were_never_given_out(record: KeyRecord | None) -> None:
    """An answer from before the change that was asked for is never given, and nothing is charged or recorded."""
    scene = scene_of(record) if record else Scene()
    with pytest.raises(RevisionUnknownError):
        await scene.validator.validate(TOKEN, min_revision=REVISION + 1)
    assert ([], []) == (scene.limiter.asked, scene.usage.recorded)


async def test_tokens_of_other_organizations_are_not_found() -> None:
    """A caller that may ask about its own organization alone can not tell another's token from none."""
    scene = scene_of()
    hidden = await scene.validator.validate(TOKEN, only_organization_id="other")
    missing = await Scene().validator.validate(TOKEN, only_organization_id="other")
    assert Verdict(outcome=Outcome.NOT_FOUND, revision=REVISION) == hidden == missing
    assert ([], []) == (scene.limiter.asked, scene.usage.recorded)


@pytest.mark.parametrize("only_organization_id", ["", RECORD.organization_id])
async def test_tokens_of_ones_own_organization(only_organization_id: str) -> None:
    """A caller is told of tokens of its own organization, and one without bounds of all."""
    verdict = await scene_of(KEY_RECORD).validator.validate(TOKEN, only_organization_id=only_organization_id)
    assert Outcome.VALID is verdict.outcome


@pytest.mark.parametrize("token", [TOKEN, "no token"], ids=["a token", "none"])
@pytest.mark.parametrize("cost", [-1, 1_000_001])
async def test_costs_that_make_no_sense(token: str, cost: int) -> None:
    """A cost below 0 or above a million is refused, whatever the token: a gateway's mistake shows at once."""
    scene = scene_of()
    with pytest.raises(InvalidFieldError) as caught:
        await scene.validator.validate(token, cost=cost)
    assert ["cost"] == [field for field, _ in caught.value.violations]
    assert [] == scene.reader.asked


@pytest.mark.parametrize("cost", [0, 1_000_000])
async def test_costs_at_the_bounds(cost: int) -> None:
    """A cost may be anything from 0 to a million, and is charged as it is."""
    scene = scene_of(replace(KEY_RECORD, rate_limit_per_minute=60))
    assert Outcome.VALID is (await scene.validator.validate(TOKEN, cost=cost)).outcome
    assert [(RECORD.key_id, 60, cost)] == scene.limiter.asked


async def test_number_of_permissions() -> None:
    """A request may need 100 permissions, and no more."""
    scene = scene_of(granting(KEY_RECORD, "*"))
    needed = [f"orders:{number}" for number in range(101)]
    assert Outcome.VALID is (await scene.validator.validate(TOKEN, required_permissions=needed[:100])).outcome
    for token in (TOKEN, "no token"):
        with pytest.raises(InvalidFieldError) as caught:
            await scene.validator.validate(token, required_permissions=needed)
        assert ["required_permissions"] == [field for field, _ in caught.value.violations]


async def test_negative_revision() -> None:
    """A revision below 0 is refused: none was ever given out."""
    with pytest.raises(InvalidFieldError) as caught:
        await scene_of().validator.validate(TOKEN, min_revision=-1)
    assert ["min_revision"] == [field for field, _ in caught.value.violations]


@pytest.mark.parametrize(
    ("permissions", "client_ip", "cost", "min_revision", "field"),
    [
        (["read"] * 101, "", 1, 0, "required_permissions"),
        ((), "", 1_000_001, 0, "cost"),
        ((), "", -1, 0, "cost"),
        ((), "", 1, -1, "min_revision"),
    ],
)
def test_needs_that_make_no_sense(
    permissions: list[str], client_ip: str, cost: int, min_revision: int, field: str
) -> None:
    """What a request needs is checked before it is kept for others."""
    with pytest.raises(InvalidFieldError) as caught:
        Need.of(permissions, client_ip, cost, min_revision)
    assert [field] == [named for named, _ in caught.value.violations]
