"""Examples that cannot be read: their error, and the policies about them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from patchgd_jax.data.protocols import ExampleSource
from patchgd_jax.errors import DataError

Policy = Literal["raise", "substitute"]
OnBad = Callable[[int, str, str], object]
"""Called with index, description and reason of an example that cannot be read."""


@dataclass(frozen=True)
class BadRecord:
    """An example that cannot be read."""

    index: int
    """In its source."""
    description: str
    """The source's: a path or a name."""
    reason: str

    def __str__(self) -> str:
        # Most readers name the file themselves.
        name = "" if self.description in self.reason else f" ({self.description})"
        return f"example {self.index}{name}: {self.reason}"


class RecordError(DataError):
    """Examples that cannot be read end the run.

    Args:
        message: the error's text.
        records: the examples; the last of them ended the run.
    """

    def __init__(self, message: str, records: tuple[BadRecord, ...] = ()) -> None:
        super().__init__(message)
        self.records = records

    @property
    def index(self) -> int:
        """Source index of the example that stopped the run."""
        return self.records[-1].index

    @property
    def description(self) -> str:
        """Path or name of the example that stopped the run."""
        return self.records[-1].description

    @property
    def reason(self) -> str:
        """Why the example that stopped the run cannot be read."""
        return self.records[-1].reason


class BadTally:
    """Counts a run's unreadable examples and ends it when that is the policy.

    Args:
        source: of the examples.
        policy: raise: the first one ends the run. substitute: one more than `limit` does.
        limit: different examples that may be unreadable.
        on_bad: called once for each, unless the policy is raise.
    """

    def __init__(self, source: ExampleSource, *, policy: Policy, limit: int, on_bad: OnBad) -> None:
        self._source = source
        self._policy = policy
        self._limit = limit
        self._on_bad = on_bad
        self._records: dict[int, BadRecord] = {}

    @property
    def tolerated(self) -> int:
        """Number of different unreadable examples that the policy tolerates."""
        return 0 if self._policy == "raise" else self._limit

    def take(self, bad: Iterable[tuple[int, str]]) -> None:
        """Counts examples, index and reason each.

        Raises:
            RecordError: if the policy does not tolerate one of them.
        """
        for index, reason in bad:
            if index in self._records:
                continue
            record = BadRecord(index, self._source.describe(index), reason)
            self._records[index] = record
            if self._policy == "raise":
                raise RecordError(
                    f"{record}; repair it, or replace it by another with "
                    "--data.bad-images substitute",
                    (record,),
                )
            self._on_bad(index, record.description, reason)
            if len(self._records) > self._limit:
                raise self.error(
                    f"{len(self._records)} unreadable examples are more than data.bad_limit "
                    f"{self._limit}; repair them, or take them out of the data"
                )

    def error(self, message: str) -> RecordError:
        """An error that lists what was counted."""
        lines = "\n  ".join([f"{message}:", *map(str, self._records.values())])
        return RecordError(lines, tuple(self._records.values()))
