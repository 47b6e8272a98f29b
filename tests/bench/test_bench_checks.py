"""What the benchmark refuses to take for a measurement, and how it counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from apikeys.v1 import key_service_pb2 as pb
from bench import report, rounds
from bench.alternation import Called, Slice, called
from bench.load import Burst, Window, evaluated
from bench.machine import BenchError, Layout, SpoiledError
from bench.metrics import Scrape
from bench.servers import Figures, Source, Target

ANSWER = pb.ValidateResponse(outcome=pb.OUTCOME_VALID, key_id="key_" + "0" * 26)
TARGET = Target(name="a server", pid=1, port=1, answer=ANSWER)
MESSAGE_BYTES = 5 + ANSWER.ByteSize()
BURST = Burst(
    per_s=100.0,
    p50_ms=1.0,
    p99_ms=2.0,
    started=104,
    succeeded=100,
    failed=0,
    data_bytes=100 * MESSAGE_BYTES,
)
H2LOAD = """
finished in 1.00s, 3.00 req/s, 1.02KB/s
requests: 3 total, 4 started, 3 done, 3 succeeded, 0 failed, 0 errored, 0 timeout
status codes: 3 2xx, 0 3xx, 0 4xx, 0 5xx
traffic: 1.02KB (1041) total, 222B (222) headers (space savings 77.53%), 687B (687) data
                     min         max         mean         sd        +/- sd
time for request:     1.00ms     30.00ms     12.00ms      4.00ms    66.67%
"""
METRICS = """
# HELP latchgate_outcomes_total Answers of Validate.
latchgate_outcomes_total{outcome="VALID"} 12.0
latchgate_outcomes_total{outcome="NOT_FOUND"} 2.0
latchgate_outcomes_total{outcome="REVOKED"} 0.0
latchgate_lookup_batch_size_bucket{le="1.0"} 1.0
latchgate_lookup_batch_size_count 3.0
latchgate_lookup_batch_size_sum 13.0
"""


def _check(burst: Burst, outcomes: dict[str, float]) -> None:
    rounds.check_sizes(burst, TARGET)
    rounds.check_outcomes(burst, outcomes)


@pytest.mark.parametrize("valid", [100, 104])
def test_an_agreeing_count_is_taken(valid: int) -> None:
    """The service may have answered what was under way when the time was up, and may not have."""
    _check(BURST, {"VALID": valid})


@pytest.mark.parametrize(
    "outcomes", [{}, {"VALID": 99}, {"VALID": 105}, {"VALID": 100, "NOT_FOUND": 1}, {"VALID": 100, "REVOKED": 1}]
)
def test_a_count_that_does_not_agree_is_refused(outcomes: dict[str, float]) -> None:
    """A turn in which the service counted other answers than h2load saw, or others than VALID, is no measurement."""
    with pytest.raises(BenchError, match="the service counted"):
        _check(BURST, outcomes)


@pytest.mark.parametrize(
    "burst",
    [
        replace(BURST, failed=1),
        replace(BURST, succeeded=0),
        replace(BURST, data_bytes=99 * MESSAGE_BYTES - 801),
        replace(BURST, data_bytes=130 * MESSAGE_BYTES),
    ],
)
def test_answers_that_are_none_are_refused(burst: Burst) -> None:
    """Calls that failed, and answers without a message of full size, as errors are, are no measurement."""
    with pytest.raises(BenchError):
        _check(burst, {"VALID": 100})


@pytest.mark.parametrize(("source", "digests"), [(Source.MEMORY, 30), (Source.DATABASE, 1000), (Source.DATABASE, 950)])
def test_answers_from_where_they_are_to_come_from_are_taken(source: Source, digests: int) -> None:
    """Calls for the same key that arrive together are looked up once; what grew old in memory is looked up anew."""
    rounds.check_source(source, 1000, digests)


@pytest.mark.parametrize(("source", "digests"), [(Source.MEMORY, 31), (Source.DATABASE, 800), (Source.DATABASE, 0)])
def test_answers_from_elsewhere_are_refused(source: Source, digests: int) -> None:
    """What is called memory is not measured from the database, nor the other way round: that may be the load,
    and the turn is done again.
    """
    with pytest.raises(SpoiledError, match="looked up"):
        rounds.check_source(source, 1000, digests)


@pytest.mark.parametrize("spoiled", [(0, 0), (0, 2), (rounds.MOST_REPEATED, rounds.MOST_REPEATED)])
async def test_spoiled_turn_is_done_again(monkeypatch: pytest.MonkeyPatch, spoiled: tuple[int, int]) -> None:
    """A turn that was not what it was to be is done again, and takes none of the others with it, however many are."""
    comparison, done = _comparison(monkeypatch, spoiled)

    turns = await comparison.run([TARGET], [b""])

    # Of the two rounds the first is not counted.
    assert ["turn"] * 2 == done
    assert 1 == len(turns)
    assert sum(spoiled) == comparison.repeated


async def test_turns_that_are_always_spoiled_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes wrong again and again is no chance: the run ends, and says what."""
    comparison, done = _comparison(monkeypatch, (rounds.MOST_REPEATED + 1, 0))
    with pytest.raises(SpoiledError, match="spoiled"):
        await comparison.run([TARGET], [b""])

    assert [] == done


def _comparison(monkeypatch: pytest.MonkeyPatch, spoiled: tuple[int, int]) -> tuple[Any, list[str]]:
    """A measurement of one counted round whose turns are spoiled so often, and the list of those that are not."""
    plan = rounds.Plan(keys=(1,), rounds=1, seconds=1.0, processes=1, in_use=1, seed=1)
    nothing: Any = None
    comparison: Any = rounds._Comparison(plan, nothing, nothing, [TARGET], lambda _: None)  # noqa: SLF001 - its rule alone
    left, done = list(spoiled), list[str]()

    async def turn(*_: object) -> str:
        if left[len(done)]:
            left[len(done)] -= 1
            raise SpoiledError("spoiled")
        done.append("turn")
        return "turn"

    monkeypatch.setattr(comparison, "_turn", turn)
    monkeypatch.setattr(comparison, "_report", lambda _: None)
    monkeypatch.setattr(rounds, "at_rest", _resting)
    return comparison, done


async def _resting(targets: Sequence[Target], _seconds: float) -> list[float]:
    """Tells of the first server that it takes a tenth of its core at rest, of the second two, and so on."""
    return [number / 10 for number in range(1, len(targets) + 1)]


async def test_rest_is_that_of_each_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """What servers were seen to take at rest goes with them into every counted turn, whichever of the two is first."""
    noop, server = replace(TARGET, name="no-op"), replace(TARGET, name="server")
    plan = rounds.Plan(keys=(1,), rounds=2, seconds=1.0, processes=1, in_use=1, seed=1)
    nothing: Any = None
    comparison: Any = rounds._Comparison(plan, nothing, nothing, [noop], lambda _: None)  # noqa: SLF001 - its rule alone
    seen = []

    async def by_turns(
        _loads: object, targets: tuple[Target, Target], *_: object, rests: tuple[float, float]
    ) -> tuple[Called, Called]:
        seen.append(dict(zip((each.name for each in targets), rests, strict=True)))
        window = Window(begin_s=0.0, told_s=0.8, end_s=1.0)
        quiet = [Slice(window=window, used_s=(0.5, 0.0), load_s=0.6)]
        each = called(0, BURST, (quiet, quiet))
        return each, each

    monkeypatch.setattr(rounds, "at_rest", _resting)
    monkeypatch.setattr(rounds, "by_turns", by_turns)
    monkeypatch.setattr(rounds, "check_sizes", lambda *_: None)
    await comparison.run([server], [b""])

    # The first round warms up.
    assert [{"no-op": 0.0, "server": 0.0}, *[{"no-op": 0.1, "server": 0.2}] * 2] == seen
    assert {"no-op": 0.1, "server": 0.2} == comparison.rests


async def test_each_server_is_compared_with_every_noop(monkeypatch: pytest.MonkeyPatch) -> None:
    """In eight rounds a server is called by turns with each of four no-ops twice, once before it and once behind."""
    noops = [replace(TARGET, name=f"no-op {number}") for number in range(1, 5)]
    targets = [replace(TARGET, name=name) for name in ("one", "another")]
    plan = rounds.Plan(keys=(1,), rounds=8, seconds=1.0, processes=1, in_use=1, seed=1)
    nothing: Any = None
    comparison: Any = rounds._Comparison(plan, nothing, nothing, noops, lambda _: None)  # noqa: SLF001 - its rule alone
    seen = []

    async def by_turns(_loads: object, order: tuple[Target, Target], *_: object, **_rests: object) -> list[Called]:
        seen.append((order[0].name, order[1].name))
        window = Window(begin_s=0.0, told_s=0.8, end_s=1.0)
        quiet = [Slice(window=window, used_s=(0.0, 0.0), load_s=0.6)]
        return [called(0, replace(BURST, per_s=50.0 if each in noops else 100.0), (quiet, quiet)) for each in order]

    monkeypatch.setattr(rounds, "at_rest", _resting)
    monkeypatch.setattr(rounds, "by_turns", by_turns)
    monkeypatch.setattr(rounds, "check_sizes", lambda *_: None)
    turns = await comparison.run(targets, [b""])

    pairs = [(target.name, noop.name) for target in targets for noop in noops]
    # The first round warms up.
    assert sorted([*pairs, *((noop, target) for target, noop in pairs)]) == sorted(seen[len(targets) :])
    assert sorted([*pairs, *pairs]) == sorted((turn.name, turn.noop_name) for turn in turns)
    assert {2.0} == {turn.ratio for turn in turns}


@pytest.mark.parametrize(
    ("count", "said"),
    [(3, ""), (8, "between 1.00 and 8.00 (95 %)"), (48, "between 17.00 and 32.00 (95 %)")],
)
def test_how_certain_a_median_is(count: int, said: str) -> None:
    """As tables of the sign test have it; of few values nothing is said."""
    values = [float(number) for number in range(count, 0, -1)]
    assert said in report.certainty(values)
    assert bool(said) == bool(report.certainty(values))


def test_calls_are_counted_while_all_connections_were_at_work() -> None:
    """Throughput and times are of the calls answered after the last connection's first, to the first one's last."""
    # Columns: start in microseconds, HTTP status, microseconds to the answer.
    early = "1000\t200\t1000\n500000\t200\t10000\n1000000\t200\t20000\n"
    late = "200000\t200\t10000\n600000\t200\t30000\n2000000\t200\t5000\n"

    burst = evaluated([H2LOAD, H2LOAD], [early, late])

    # From 0.21 s to 1.02 s: answers at 0.51, 0.63 and 1.02 s.
    assert pytest.approx(3 / 0.81) == burst.per_s
    assert (20.0, 30.0) == (burst.p50_ms, burst.p99_ms)
    assert (8, 6, 0, 1374) == (burst.started, burst.succeeded, burst.failed, burst.data_bytes)


def test_calls_are_counted_within_windows() -> None:
    """Throughput is of the calls answered within a window, times are of those that began early enough in one."""
    # Began at 0.1, 0.5, 0.98 and 1.2 s, answered at 0.15, 0.51, 1.08 and 1.21 s.
    one = "100000\t200\t50000\n500000\t200\t10000\n980000\t200\t100000\n1200000\t200\t10000\n"
    # Began at 0.6 s, and was told of long after the window.
    other = "600000\t200\t900000\n"
    windows = [Window(begin_s=0.2, told_s=0.9, end_s=1.0), Window(begin_s=1.1, told_s=1.25, end_s=1.3)]

    burst = evaluated([H2LOAD, H2LOAD], [one, other], windows)

    assert pytest.approx(2 / 1.0) == burst.per_s
    # 10, 10 and 900 ms.
    assert (10.0, 900.0) == (burst.p50_ms, burst.p99_ms)


def test_what_is_done_in_the_others_time_is_charged() -> None:
    """The time in which a server works while the other is called is added to its own, and taken off the other's."""
    window = Window(begin_s=0.0, told_s=0.8, end_s=1.0)
    busy = Slice(window=window, used_s=(0.9, 0.0), load_s=0.6)
    quiet = Slice(window=window, used_s=(0.25, 0.7), load_s=0.4)
    slices = ([busy, busy], [quiet, quiet])

    first, second = (called(number, BURST, slices) for number in (0, 1))

    # 200 calls each within 2 s: the one worked for half a second of the other's time.
    assert [pytest.approx(200 / 2.5), pytest.approx(200 / 1.5)] == [first.per_s, second.per_s]
    assert [pytest.approx(0.6), pytest.approx(0.4)] == [first.load_share, second.load_share]
    assert pytest.approx(2.3e6 / 200) == first.server_cpu_us
    assert pytest.approx(1.4e6 / 200) == second.server_cpu_us


def test_what_is_done_at_any_time_is_charged_once() -> None:
    """What a server does whether it is called or not it has done in its own time: in the other's it is not charged."""
    window = Window(begin_s=0.0, told_s=0.8, end_s=1.0)
    own, others = (Slice(window=window, used_s=(used_s, 0.5), load_s=0.6) for used_s in (0.9, 0.25))
    slices = ([own, own], [others, others])

    charged = [called(0, BURST, slices, rest) for rest in (0.1, 0.25, 0.3)]

    # 200 calls within 2 s, of which the other worked for one; beside, half a second less a tenth of the two.
    assert [pytest.approx(200 / each) for each in (1.3, 1.0, 1.0)] == [each.per_s for each in charged]
    assert [pytest.approx(each * 1e6 / 200) for each in (2.1, 1.8, 1.8)] == [each.server_cpu_us for each in charged]


@pytest.mark.parametrize(
    ("output", "log"),
    [("h2load: unknown option", "1\t200\t1\n9\t200\t1\n"), (H2LOAD, ""), (H2LOAD, "1\t200\t1\n")],
)
def test_what_h2load_does_not_say_is_not_made_up(output: str, log: str) -> None:
    """Results in another form, and connections without answers or with too few, are an error and no figure."""
    with pytest.raises(BenchError):
        evaluated([output], [log])


def test_counters_are_compared() -> None:
    """Outcomes that did not grow are left out; the others and the statements are told by how much they grew."""
    before = Figures.of(Scrape.parse(METRICS))
    after = Figures.of(Scrape.parse(METRICS.replace("} 12.0", "} 20.0").replace("sum 13.0", "sum 23.0")))

    grown = after.since(before)

    assert {"VALID": 8.0} == grown.outcomes
    assert (0.0, 10.0) == (grown.statements, grown.digests)


@pytest.mark.parametrize(
    ("cores", "layout"),
    [
        ({0, 1}, Layout(total=2, server=1, load=0, database=(0,))),
        ({2, 3, 5, 7}, Layout(total=4, server=7, load=2, database=(3, 5))),
    ],
)
def test_the_server_has_a_core_of_its_own(cores: set[int], layout: Layout) -> None:
    """Neither load nor database run on the server's core; with two cores they share the other."""
    assert layout == Layout.share_out(cores)
