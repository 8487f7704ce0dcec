"""Start the servers that are to be measured, and wait until they are at their best."""

import time
from pathlib import Path

from bench.contenders import Contender
from bench.progress import progress

COMPILE_WAIT_S = 300.0  # of our first start on a machine; the code is kept for the next
LOGS = Path(__file__).with_name("results") / "logs"


def start(contenders: list[Contender], compile_wait_s: float) -> None:
    """One after the other, so that none disturbs another's warm-up; ours also until its compiled code is in place."""
    for contender in progress(contenders, "starting"):
        contender.start(LOGS)
        if not contender.wait_ready():
            raise RuntimeError(f"{contender.name} did not get ready: {contender.last_words()}")
        if contender.name == "ours":
            began = time.monotonic()
            is_compiled = contender.wait_ready(lambda body: body.get("compiled") is True, limit=compile_wait_s)
            waited = (
                f"after {time.monotonic() - began:.0f} s more" if is_compiled else f"not within {compile_wait_s:g} s"
            )
            contender.settings = {key: contender.readiness[key] for key in ("dtype", "compiled")}
            print(f"ours: ready; compiled code in place: {waited}")
        contender.rest()
