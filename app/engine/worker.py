"""The process that owns one device. It warms up, serves its pipe, and leaves with it; torch lives from here down.

Run by app.engine.process as `python -m app.engine.worker SOCKET FLIGHT CONFIG`: two descriptors, and JSON.
"""

import ctypes
import os
import signal
import socket
import sys
from collections.abc import Callable

import msgspec

from app import logs
from app.engine.flight import Flight
from app.engine.messages import EngineConfig, Fatal, Ready
from app.engine.wire import Wire
from models.catalog import families

PR_SET_PDEATHSIG = 1  # prctl(2): the signal that we get when our parent ends


def main() -> None:
    """Serve one device until the pipe closes."""
    # Signals to the process group are the HTTP process's business: the engine leaves when its pipe does.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":  # even where it cannot read its pipe
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    wire = Wire(socket.socket(fileno=int(sys.argv[1])))
    flight = Flight(int(sys.argv[2]))
    config = msgspec.json.decode(sys.argv[3], type=EngineConfig)
    logs.set_up(config.log_level, libraries="warning", device=config.name)
    logs.take_prints()
    if not families(config.catalogs)[config.model or "sdxl"].asks_hub(config.directory):
        os.environ["HF_HUB_OFFLINE"] = "1"  # all is here: no library may ask a hub
    try:
        serve = _start(wire, flight, config)
    except BaseException as error:  # whatever it is, it would fail again
        wire.last_word(Fatal(_sentence(error)))
        logs.leave(1)
    serve()


def _start(wire: Wire, flight: Flight, config: EngineConfig) -> Callable[[], None]:
    """Torch and all that needs it, imported here: the pipe is read by now, and what fails is told."""
    from app.engine import upgrade
    from app.engine.load import open_model
    from app.engine.loop import Loop

    logs.take_handlers()
    logs.say("engine started")
    model = open_model(config)
    costs = model.measure(model.batches[: model.device.first_batches])
    loop = Loop(model.pipeline, model.registry, costs, wire.send, model.workers)
    loop.note = flight.write
    upgrade.later(loop, model, config)
    wire.hear = loop.post
    wire.send(Ready(model.family.name, model.device.name, model.dtype, costs, loop.report()))
    return loop.run


def _sentence(error: BaseException) -> str:
    text = " ".join(str(error).split())
    is_ours = type(error).__module__.startswith(("app.", "models."))  # these say it in words
    return text if is_ours else f"{type(error).__name__}: {text[:300]}"


if __name__ == "__main__":
    main()
