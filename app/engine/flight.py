"""The pictures that an engine is working on now, in memory that outlives it: what it died of is among them."""

import mmap
import os
from array import array
from collections.abc import Sequence

BYTES = 1 << 16
MOST = BYTES // 8 - 1  # ids


class Flight:
    """Shared by the two processes; one writes, and the other reads once the first has gone. A message could still be
    in the engine when that dies. descriptor: of the other's; None makes a new one."""

    def __init__(self, descriptor: int | None = None) -> None:
        self.descriptor = os.memfd_create("flight") if descriptor is None else descriptor
        os.truncate(self.descriptor, BYTES)
        self._memory = mmap.mmap(self.descriptor, BYTES)

    def write(self, ids: Sequence[int]) -> None:
        """These are in a call now, and no others."""
        record = array("Q", [0, *ids[:MOST]])
        self._memory[: len(record) * 8] = record.tobytes()
        self._memory[:8] = array("Q", [len(record) - 1]).tobytes()  # last: half a record says that there is none

    def read(self) -> set[int]:
        """What was written last."""
        (count,) = array("Q", self._memory[:8])
        return set(array("Q", self._memory[8 : 8 * (1 + count)]))
