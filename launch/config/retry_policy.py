"""Retry policy of a pool of replicas."""

from dataclasses import dataclass

from opd.errors import ConfigurationError


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """Deadlines, attempts and restarts of a pool of replicas before a run ends.

    `deadline_s` bounds every wait for an answer, `start_deadline_s` that for a new replica. A request is tried on at
    most `attempts` replicas; `restarts` replicas are started anew in a run, in each pool. After
    `max_consecutive_failures` faults without an answer between them no replica is asked for `cooldown_s` seconds, twice
    as long each time (a circuit breaker). `hedge_quantile` > 0: a call that takes longer than this quantile of those
    before is given to a second replica, too, and the first answer counts.
    """

    deadline_s: float
    start_deadline_s: float = 300.0
    attempts: int = 4
    restarts: int = 8
    max_consecutive_failures: int = 5
    cooldown_s: float = 1.0
    hedge_quantile: float = 0.0

    def __post_init__(self) -> None:
        if (
            not 0 <= self.hedge_quantile < 1
            or self.attempts < 1
            or self.restarts < 0
            or self.max_consecutive_failures < 1
        ):
            raise ConfigurationError(
                f"a retry policy needs attempts and max_consecutive_failures >= 1, restarts >= 0 and "
                f"0 <= hedge_quantile < 1, got {self}; correct the field that is out of range"
            )
