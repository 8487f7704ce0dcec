"""How many cores this process may use."""

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """The lower of affinity and the container's quota."""
    return lower(len(os.sched_getaffinity(0)), _quota())


def lower(cores: int, quota: str) -> int:
    """The lower of some cores and a quota as in cgroup's cpu.max: "microseconds period", or "max" (v1: -1) for none.
    At least 1; a part of a core does not count, for a thread that waits for its share delays all others."""
    allowed, period = quota.split()
    return cores if allowed in ("max", "-1") else max(1, min(cores, int(allowed) // int(period)))


def _quota() -> str:
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        paths = [CGROUP / file for file in files]
        if all(path.is_file() for path in paths):
            return " ".join(path.read_text().strip() for path in paths)
    return "max 100000"
