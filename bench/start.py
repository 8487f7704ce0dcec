"""Start the servers that are to be measured, and wait until they are at their best."""

import time
from pathlib import Path

from bench.contenders import Contender
from bench.progress import progress

FULL_SPEED_S = 60.0  # after it is ready: a server that says it is not yet at its best is waited for so long
LOGS = Path(__file__).with_name("results") / "logs"


def start(contenders: list[Contender]) -> None:
    """One after the other, so that none disturbs another's warm-up."""
    for contender in progress(contenders, "starting"):
        contender.start(LOGS)
        if not contender.wait_ready():
            raise RuntimeError(f"{contender.name} did not get ready: {contender.last_words()}")
        began, said = time.monotonic(), contender.readiness
        is_fast = contender.wait_ready(lambda body: body.get("compiled", True), FULL_SPEED_S)
        waited = f"{'at' if is_fast else 'NOT at'} full speed {time.monotonic() - began:.1f} s later"
        print(f"{contender.name}: ready; {waited}")
        contender.settings = {key: contender.readiness[key] for key in ("dtype", "compiled") if key in said}
        contender.rest()
