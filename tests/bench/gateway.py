"""`make bench-gateway`: what it costs Envoy to ask about keys; writes docs/gateways/performance.md.

Exit codes: 0 measured (whatever the figures), 1 the figures can not be had or not be believed, 2 bad arguments,
3 the machine lacks what it takes, 130 stopped.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from bench import command, database, gateway_page, servers  # noqa: E402 - found by the line above
from bench.command import positive, say  # noqa: E402 - the same
from bench.gateway_page import Plan, Results, Turn  # noqa: E402 - the same
from bench.gateways import Gateway, Guard, gateway  # noqa: E402 - the same
from bench.machine import BenchError, Layout, UnfitError, core_busy_s, free_port, process_cpu_s  # noqa: E402 - the same
from bench.report import as_text  # noqa: E402 - the same
from bench.servers import Service, Source  # noqa: E402 - the same

PAGE = ROOT / "docs" / "gateways" / "performance.md"
SCRIPT = Path(__file__).with_name("tokens.lua")
_FIGURES = 5


def main() -> int:
    """Runs the benchmark and gives the exit code."""
    parser = command.arguments("make bench-gateway", "Measures Envoy with and without keys.", rounds=7, seconds=5.0)
    parser.add_argument("--keys", type=positive, default=10_000, help="how many (%(default)s)")
    parser.add_argument("--connections", type=positive, default=32, help="of the load (%(default)s)")
    command.take_note(parser)
    arguments = parser.parse_args()
    if shutil.which("wrk") is None:
        raise UnfitError("there is no wrk, which sends the load; on Debian and Ubuntu: apt-get install wrk")
    layout = command.one_core_for_the_load()
    plan = Plan(
        rounds=arguments.rounds,
        seconds=arguments.seconds,
        keys=arguments.keys,
        connections=arguments.connections,
        note=arguments.note,
    )
    results = Results(plan=plan, total_cores=layout.total, turns=command.run(_measure(plan, layout)))
    say("")
    say(as_text(gateway_page.table(results)))
    for line in gateway_page.findings(results):
        say(line)
    command.write_page(gateway_page.write(results), arguments.output, PAGE)
    return 0


async def _measure(plan: Plan, layout: Layout) -> Sequence[Turn]:
    """Has the guards take turns; a first round, in which every token is seen once, is not counted."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="latchgate-bench-")))
        cluster = await stack.enter_async_context(database.cluster(layout.database))
        seeded = await stack.enter_async_context(cluster.seeded(plan.keys))
        # Envoy's own filter counts nothing either.
        await database.lift_limits(seeded.url)
        http_port = free_port()
        settings = {"LATCHGATE_HTTP_LISTEN": f"127.0.0.1:{http_port}"}
        service = await stack.enter_async_context(
            servers.service(seeded, Source.MEMORY, layout.server, folder, settings=settings)
        )
        await service.warm()
        tokens = folder / "tokens"
        tokens.write_text("".join(f"{token}\n" for token in seeded.tokens))
        envoy = await stack.enter_async_context(gateway(service, http_port, layout.server, folder))
        turns = []
        for number in range(plan.rounds + 1):
            # No guard always follows the same other.
            order = list(Guard)[number % len(Guard) :] + list(Guard)[: number % len(Guard)]
            for guard in order:
                turn = await _turn(number, guard, plan, envoy, service, tokens, layout.server)
                say(
                    f"{f'round {number}' if number else 'warm-up':8} {guard.value:31} {turn.per_s:7,.0f}/s  p50"
                    f" {turn.p50_ms:5.1f} ms  p99 {turn.p99_ms:5.1f} ms  Envoy {turn.envoy_us:4.0f} us  latchgate"
                    f" {turn.service_us:4.0f} us"
                )
                if number:
                    turns.append(turn)
        return turns


async def _turn(
    number: int, guard: Guard, plan: Plan, envoy: Gateway, service: Service, tokens: Path, core: int
) -> Turn:
    """Loads one guard, and demands that every request got through. Raises BenchError."""
    # Every token once in the warm-up.
    seconds = plan.seconds if number else max(plan.seconds, plan.keys / 1000)
    before = await service.figures()
    busy_s, envoy_s, service_s = core_busy_s(core), process_cpu_s(envoy.pid), process_cpu_s(service.pid)
    process = await asyncio.create_subprocess_exec(
        *("wrk", "--threads", "1", "--connections", str(plan.connections), "--duration", f"{round(seconds)}s"),
        *("--script", str(SCRIPT), envoy.url(guard), "--", str(tokens)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    output, errors = await process.communicate()
    busy_s = core_busy_s(core) - busy_s
    envoy_s, service_s = process_cpu_s(envoy.pid) - envoy_s, process_cpu_s(service.pid) - service_s
    figures = output.decode().strip().rpartition("\n")[2].split()
    if process.returncode or len(figures) != _FIGURES:
        raise BenchError(f"wrk failed: {errors.decode().strip().rpartition(chr(10))[2]}")
    requests, lasted_us, p50_us, p99_us, failed = map(int, figures)
    if failed:
        raise BenchError(f"{failed} of {requests} good requests were refused, or failed, with {guard.value}")
    judged = sum((await service.figures()).since(before).outcomes.values())
    is_asked = guard in {Guard.OVER_GRPC, Guard.OVER_HTTP}
    # What was under way at the end of the load was judged as well.
    if not (requests <= judged <= requests + plan.connections if is_asked else judged == 0):
        raise BenchError(f"{requests} requests with {guard.value}, and latchgate judged {judged:.0f} tokens")
    lasted_s = lasted_us / 1e6
    return Turn(
        round=number,
        guard=guard,
        per_s=requests / lasted_s,
        p50_ms=p50_us / 1000,
        p99_ms=p99_us / 1000,
        envoy_us=envoy_s * 1e6 / requests,
        service_us=service_s * 1e6 / requests,
        busy=busy_s / lasted_s,
    )


if __name__ == "__main__":
    sys.exit(command.exit_code(main))
