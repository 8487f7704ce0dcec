"""From what was seen to figures, each with its aim: the lines of the table."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.chaos.clients import GRACE_S, Attempt, Books, Crowd
from bench.chaos.faults import Window
from bench.chaos.rig import Look, Rig
from bench.load import percentile

MB = 1e6
SHORT_S = 1800.0  # in a shorter run an hour's growth is a guess: its aim is wider by as much
FIRST = 0.2  # of the run, in which memory finds its size
SEEN_S = 1.0  # for /ready to tell that an engine has died


@dataclass(frozen=True)
class Line:
    """One promise. id: as in docs/reliability.md. figure: what was measured; aim: at the most (or, of shares, at the
    least)."""

    id: str
    promise: str
    figure: float
    aim: float
    unit: str
    is_share: bool = False

    @property
    def verdict(self) -> str:
        """Whether the aim was reached; what did not happen in a short run was not measured."""
        if math.isnan(self.figure):
            return "not measured"
        return "holds" if (self.figure >= self.aim if self.is_share else self.figure <= self.aim) else "BROKEN"


def of_requests(crowd: Crowd, books: Books, windows: Sequence[Window]) -> list[Line]:
    """What became of every request."""
    attempts = crowd.attempts
    answered = [each for each in attempts if each.outcome not in ("left", "none")]
    late = [each for each in answered if each.timeout and each.lateness > GRACE_S]
    expired = [each.lateness for each in answered if each.outcome == "expired"]
    refused = [each for each in answered if each.outcome == "refused"]
    calm = [each for each in attempts if each.kind in ("draw", "slow") and not _meets(each, windows)]
    served = sum(each.outcome == "ok" for each in calm)
    slowest = percentile([1e3 * (each.end - each.begin) for each in refused], 99)
    return [
        Line("C1 ledger", "the clients' ledger and the server's differ by", books.difference, 0, "requests"),
        Line("C1 answered", "requests without any answer", books.ours["none"], 0, "requests"),
        Line("C1 late", f"answers later than the deadline and {GRACE_S:g} s", len(late), 0, "requests"),
        Line(
            "C1 available", "of requests outside faults are served", round(served / max(1, len(calm)), 4), 1, "", True
        ),
        Line("R1", "a refusal takes, p99", round(slowest, 1), 250, "ms"),
        Line("R1 told", "refusals without Retry-After", sum(not each.told for each in refused), 0, "requests"),
        Line("R4", "a 504 comes after its deadline, at the latest", round(max(expired, default=math.nan), 3), 0.5, "s"),
        Line("R10", "black or blank pictures", crowd.blank, 0, "pictures"),
        Line("R11", "the same request brought other bytes", crowd.changed, 0, "pictures"),
    ]


def of_health(looks: Sequence[Look], windows: Sequence[Window], engines: int) -> list[Line]:
    """What the health checks said while one of the engines died."""
    deaths = [window for window in windows if window.fault in ("kill", "hang")]
    stopped = [window for window in windows if window.fault == "pause_http"]
    mute = [look for look in looks if look.live != 200 and not any(_within(look.at, window) for window in stopped)]
    kills = [window for window in deaths if window.fault == "kill"]
    seen = [_first(looks, window, lambda look: look.engines < engines) for window in kills]
    again = [window.end - window.begin for window in deaths]
    return [
        Line("R5 live", "/live does not say 200", len(mute), 0, "looks"),
        Line("R5 seen", "/ready tells of a killed engine within", round(max(seen, default=math.nan), 2), SEEN_S, "s"),
        Line("R5 again", "after a death it serves again within", round(max(again, default=math.nan), 1), 90, "s"),
    ]


def of_memory(rig: Rig, begin: float, end: float) -> list[Line]:
    """Whether both processes stay as they are: least squares over the run but for its beginning; of bytes in use, over
    its moments of rest."""
    lines, start = [], begin + FIRST * (end - begin)
    seconds = end - start
    for name, title in (("http", "HTTP"), ("engine", "engine")):
        mine = [size for size in rig.sizes if size.process == name and start <= size.at <= end]
        probed = rig.live_bytes(name)[mine[-1].pid]
        rests = [[each for each in probed if first <= each[0] <= last] for first, last in rig.rests if first >= start]
        live = slope([seen[-1] for seen in rests if seen]) * 3600 / MB
        rss = [(size.at, float(size.rss)) for size in mine]
        share = slope(rss) * seconds / (sum(value for _, value in rss) / len(rss))
        lines += [
            Line(f"R14 {title}", "bytes in use at rest grow by", round(live, 2), max(1.0, SHORT_S / seconds), "MB/h"),
            Line(f"R14 {title}", "resident memory grew in the run by", round(100 * share, 2), 3, "%"),
        ]
    http = [size for size in rig.sizes if size.process == "http" and start <= size.at <= end]
    for noun, values in (("descriptors", [s.descriptors for s in http]), ("threads", [s.threads for s in http])):
        growth = slope([(size.at, float(value)) for size, value in zip(http, values, strict=True)]) * seconds
        lines.append(Line(f"R14 {noun}", f"{noun} of HTTP grew by", round(growth, 1), 3, ""))
    return lines


def of_loop(before: dict[str, float], after: dict[str, float]) -> list[Line]:
    """How late the event loop was: the bucket that holds the share."""
    name = "sdxl_loop_lag_seconds_bucket"
    grown = sorted(
        (math.inf if "+Inf" in key else float(key.split('"')[1]), value - before.get(key, 0))
        for key, value in after.items()
        if key.startswith(name)
    )
    within = next(bound for bound, count in grown if count >= 0.99 * grown[-1][1])
    return [Line("R18", "the event loop is late, p99, at most", within * 1e3, 50, "ms")]


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Least squares: units a second. NaN of fewer than two moments."""
    if len(points) < 2:
        return math.nan
    x0, y0 = (sum(column) / len(points) for column in zip(*points, strict=True))
    squares = sum((x - x0) ** 2 for x, _ in points)
    return sum((x - x0) * (y - y0) for x, y in points) / squares if squares else math.nan


def _meets(attempt: Attempt, windows: Sequence[Window]) -> bool:
    """Whether a request was there while a fault was."""
    return any(window.is_down and attempt.begin <= window.end and attempt.end >= window.begin for window in windows)


def _within(at: float, window: Window) -> bool:
    return window.begin - 2.5 <= at <= window.end


def _first(looks: Sequence[Look], window: Window, wanted: Callable[[Look], bool]) -> float:
    """Seconds from a fault's beginning to the first look that is so; infinity where none is."""
    return next((look.at - window.begin for look in looks if look.at >= window.begin and wanted(look)), math.inf)
