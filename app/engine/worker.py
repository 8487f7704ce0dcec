"""The process that owns one device. It warms up, serves its pipe, and leaves with it; torch lives from here down.

Run by app.engine.process as `python -m app.engine.worker FD CONFIG`.
"""

import signal
import socket
import sys

import msgspec

from app.engine import upgrade
from app.engine.load import CANNOT_OPEN, open_model
from app.engine.loop import Loop
from app.engine.messages import EngineConfig, Fatal, Ready
from app.engine.wire import Wire
from app.logs import say


def main() -> None:
    """Serve one device until the pipe closes."""
    say("engine started")  # behind its imports
    # Signals to the process group are the HTTP process's business: the engine leaves when its pipe does.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    wire = Wire(socket.socket(fileno=int(sys.argv[1])))
    config = msgspec.json.decode(sys.argv[2], type=EngineConfig)
    try:
        model = open_model(config)
        costs = model.measure(model.batches[: model.device.first_batches])
    except CANNOT_OPEN as error:
        wire.last_word(Fatal(str(error)))
        raise SystemExit(f"the engine cannot start: {error}") from error
    loop = Loop(model.pipeline, model.registry, costs, wire.send, model.workers)
    upgrade.later(loop, model, config)
    wire.feed(loop.post)
    wire.send(Ready(model.family.name, model.device.name, model.dtype, costs, loop.report()))
    loop.run()


if __name__ == "__main__":
    main()
