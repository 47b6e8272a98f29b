"""When what could not be delivered is tried again, and when it is given up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

# Beyond this many doublings every step is at its longest anyway.
_MAX_DOUBLINGS = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryTerms:
    """How retries are spread.

    The n-th comes after a random time between 0 and `base_s` times 2 to the n-th, at most `longest_s`, and at least
    `shortest_s` (full jitter: many that failed together do not come back together). Nothing is tried again later than
    `give_up_after` from its first attempt.
    """

    shortest_s: float = 1.0
    base_s: float = 5.0
    longest_s: float = 4 * 3600.0
    give_up_after: timedelta = timedelta(days=3)

    def next_time(
        self, attempts: int, first_time: datetime, now: datetime, random: Callable[[], float], asked_s: float = 0.0
    ) -> datetime | None:
        """Gives when to try again after `attempts` attempts; None if it is to be given up.

        Args:
            attempts: How many have failed, this one included.
            first_time: When the first was made.
            now: The time of the last one.
            random: Gives numbers from 0 to 1.
            asked_s: For how many seconds the other side has asked to be left alone (Retry-After); kept within
                `longest_s`.
        """
        step_s = min(self.longest_s, self.base_s * 2.0 ** min(attempts - 1, _MAX_DOUBLINGS))
        wait_s = max(self.shortest_s, random() * step_s, min(asked_s, self.longest_s))
        later = now + timedelta(seconds=wait_s)
        return None if later > first_time + self.give_up_after else later
