"""Start the servers that are to be measured, and wait until they are at their best."""

import time
from pathlib import Path

from bench.contenders import COMPILE_S, Contender
from bench.progress import progress

LOGS = Path(__file__).with_name("results") / "logs"


def start(contenders: list[Contender], logs: Path = LOGS) -> None:
    """One after the other, so that none disturbs another's warm-up; ours also until its compiled code is in place."""
    for contender in progress(contenders, "starting"):
        contender.start(logs)
        if not contender.wait_ready():
            raise RuntimeError(f"{contender.name} did not get ready: {contender.last_words()}")
        if contender.name == "ours":
            began = time.monotonic()
            is_compiled = contender.wait_ready(lambda body: body.get("compiled") is True, limit=COMPILE_S)
            waited = f"after {time.monotonic() - began:.0f} s more" if is_compiled else f"not within {COMPILE_S:.0f} s"
            contender.settings = {key: contender.readiness[key] for key in ("dtype", "compiled")}
            print(f"ours: ready; compiled code in place: {waited}")
        contender.rest()
