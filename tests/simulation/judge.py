"""What must hold of every answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from latchgate.domain.coherence import CLOCK_DRIFT
from latchgate.domain.model import Outcome, Verdict
from simulation.database import EXPIRING_KEY, TOKEN_KEYS, Change, Database
from simulation.worker import Worker
from simulation.world import World

# An end that is set for a key may come this early: a statement's answer tells the time as exactly as it was fast.
MOST_EARLY_S: Final = 1.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Question:
    """A Validate, and what held when it was asked. Its answer must take account of all changes up to `required`."""

    worker: Worker
    token: str
    asked_s: float
    asked_wall_s: float
    required: int
    is_final: bool


class Judge:
    """Knows what was called effective, and what the database has lost; a wrong answer ends the world."""

    def __init__(self, world: World, database: Database) -> None:
        """Takes the world, and the database's true history."""
        self._world = world
        self._database = database
        # All changes up to here were called effective.
        self.effective = 0
        # When a standby took over that had lost changes; when the database's clock was set.
        self.lost_s = float("-inf")
        self.clock_set_s = float("-inf")
        self.from_memory = 0

    def hold(self, change: Change, revision: int) -> bool:
        """From now on a change was called effective; says whether it is still there."""
        if self._database.revision_of(change) != revision:
            return False
        self._world.note("effective", revision)
        self.effective = max(self.effective, revision)
        return True

    def lose(self) -> None:
        """From now on changes may be gone that were called effective."""
        self.lost_s = self._world.now_s
        self.effective = min(self.effective, self._database.head)

    def judge(self, question: Question, verdict: Verdict, *, is_from_memory: bool) -> None:
        """Judges an answer. `history` is what tokens were worth after each change."""
        worker, database = question.worker, self._database
        if is_from_memory:
            self.from_memory += 1
            if question.asked_s > worker.path.renewed_s + worker.coherence.terms.length_s:
                self._world.fail(f"{worker.name} answers from memory, {verdict.outcome}, without a lease")
        if question.asked_s < self.lost_s or self._is_behind(question):
            return
        key = TOKEN_KEYS.get(question.token)
        if key is None:
            if verdict.outcome is not Outcome.NOT_FOUND:
                self._world.fail(f"{worker.name} has found a token that is none")
            return
        if key == EXPIRING_KEY and self._is_timely(question, verdict):
            return
        seen = verdict.outcome, verdict.record.shown.decode() if verdict.record else ""
        least = max(question.required, verdict.revision)
        if seen not in [views[key] for views in database.history[least:]]:
            right = [views[key] for views in database.history[question.required :]]
            self._world.fail(
                f"{worker.name}, asked at {question.asked_s:.6f} for key {key}, answers {seen} as of "
                f"{verdict.revision}{' from memory' if is_from_memory else ''}; effective was {question.required}, "
                f"which makes it {right}"
            )

    def _is_behind(self, question: Question) -> bool:
        """Says whether a worker can not know yet that the database has lost changes: for a lease, and no longer."""
        worker = question.worker
        return (
            question.asked_s < self.lost_s + worker.coherence.terms.length_s
            and worker.heard_timeline != self._database.timeline_name
        )

    def _is_timely(self, question: Question, verdict: Verdict) -> bool:
        """Judges an answer for a key that expires by the database's clock; says whether no other can be asked for."""
        worker, expire_s = question.worker, self._database.expire_s
        length_s = worker.coherence.terms.length_s
        if question.asked_s < self.clock_set_s + length_s:
            return True
        if verdict.outcome is Outcome.EXPIRED:
            if self._database.wall_s() < expire_s - MOST_EARLY_S:
                self._world.fail(f"{worker.name} calls a key expired that is not")
            return True
        if verdict.outcome is Outcome.VALID and question.asked_wall_s > expire_s + length_s * CLOCK_DRIFT:
            self._world.fail(f"{worker.name} accepts a key {question.asked_wall_s - expire_s:.4f} s after its end")
        return False
