"""What is put into the server's processes from outside, by a sitecustomize on their path: a probe of their memory, and
where it is asked for a planted fault, which must turn a line of the table red."""

from dataclasses import dataclass
from pathlib import Path

PROBE = """
import ctypes, gc, json, os, sys, threading, time, tracemalloc

IS_ENGINE, IS_HTTP = "app.engine.worker" in sys.orig_argv, "app.cli" in sys.orig_argv

class Info(ctypes.Structure):  # struct mallinfo2 of malloc.h
    _fields_ = [(name, ctypes.c_size_t) for name in
        ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]

def probe():
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Info
    with open(os.path.join(os.environ["CHAOS_DIR"], f"{'engine' if IS_ENGINE else 'http'}-{os.getpid()}"), "a") as file:
        while True:
            time.sleep(1)
            gc.collect()
            info = mallinfo2()
            python = tracemalloc.get_traced_memory()[0] if IS_HTTP else 0
            print(json.dumps([time.monotonic(), info.uordblks + info.hblkhd, python]), file=file, flush=True)

if IS_HTTP:
    tracemalloc.start()
if IS_ENGINE or IS_HTTP:
    threading.Thread(target=probe, daemon=True, name="probe").start()

def when_imported(name, change):
    def wait():
        while name not in sys.modules or not getattr(sys.modules[name], "__spec__", None) \\
                or getattr(sys.modules[name].__spec__, "_initializing", False):
            time.sleep(0.01)
        change(sys.modules[name])
    threading.Thread(target=wait, daemon=True).start()
"""


@dataclass(frozen=True)
class Plant:
    """Something broken. act: in which it is seen. lines: of the table, all of which must see it."""

    act: str
    lines: tuple[str, ...]
    code: str


def _every(seconds: float, call: str, where: str) -> str:
    """Do the same again and again, in a thread of one kind of process, and keep what comes of it."""
    return f"""
def again():
    kept = []
    while True:
        time.sleep({seconds})
        kept.append({call})
if {where}:
    threading.Thread(target=again, daemon=True).start()
"""


def _patch(module: str, body: str) -> str:
    """Change a module of the HTTP process, which `body` calls `it`, once it is imported."""
    lines = "\n".join(f"    {line}" for line in body.strip().splitlines())
    return f"""
def change(it):
    count = iter(range(10**9))
{lines}
if IS_HTTP:
    when_imported("{module}", change)
"""


_SLOW_FUNERAL = """
import asyncio
bury = it.EngineProcess._bury
async def slow(self):
    {}
    await bury(self)
it.EngineProcess._bury = slow
"""

PLANTS = {
    "leak": Plant("soak", ("R14 engine",), _every(0.5, "bytearray(100_000)", "IS_ENGINE")),
    "leak-http": Plant("soak", ("R14 HTTP",), _every(0.5, "bytearray(100_000)", "IS_HTTP")),
    "descriptors": Plant("soak", ("R14 descriptors",), _every(1, "os.open(os.devnull, os.O_RDONLY)", "IS_HTTP")),
    "threads": Plant(
        "soak",
        ("R14 threads",),
        _every(1, "threading.Thread(target=time.sleep, args=(9999,), daemon=True).start()", "IS_HTTP"),
    ),
    "endless": Plant(  # it ends when it is killed, and not before
        "soak", ("R12", "R12 left"), _patch("app.http.server", "it.Server.handle_exit = lambda *_: None")
    ),
    "hasty": Plant(
        "soak",
        ("R12 failed",),
        _patch("app.http.server", "it.Server.handle_exit = lambda self, *_: os._exit(0)"),
    ),
    "late to live": Plant("chaos", ("R17",), "if IS_HTTP:\n    time.sleep(6)\n"),
    "black": Plant(
        "chaos",
        ("R10", "R11"),
        _patch(
            "app.images",
            """
encode = it.encode
it.encode = lambda pixels, *rest: encode(bytes(len(pixels)) if next(count) % 50 == 9 else pixels, *rest)
""",
        ),
    ),
    "mute": Plant(
        "chaos",
        ("C1 answered",),
        _patch(
            "app.engine.queue",
            """
import asyncio
ticket = it.Ticket.next
async def next_(self):
    if next(count) % 100 == 9:
        await asyncio.sleep(3600)
    return await ticket(self)
it.Ticket.next = next_
""",
        ),
    ),
    "late": Plant(
        "chaos",
        ("C1 late", "R4"),
        _patch(
            "app.engine.queue",
            """
import asyncio
ticket = it.Ticket.next
async def next_(self):
    try:
        return await ticket(self)
    except it.Problem:
        await asyncio.sleep(2)
        raise
it.Ticket.next = next_
""",
        ),
    ),
    "lost": Plant(
        "chaos",
        ("C1 available",),
        _patch(
            "app.engine.queue",
            """
settle = it.Queue.settle
it.Queue.settle = lambda self, *event: next(count) % 50 == 9 or settle(self, *event)
""",
        ),
    ),
    "stuck": Plant(
        "chaos",
        ("R3",),
        _patch(
            "app.engine.queue",
            """
pop = it.Queue._pop
it.Queue._pop = lambda self, id: self._pending.get(id) if next(count) % 50 == 9 else pop(self, id)
""",
        ),
    ),
    "miscounted": Plant(
        "chaos",
        ("C1 ledger",),
        _patch(
            "app.http.ledger",
            """
outcome = it._outcome
it._outcome = lambda state: "dropped" if next(count) % 50 == 9 else outcome(state)
""",
        ),
    ),
    "untold": Plant(
        "chaos",
        ("R1 told",),
        _patch("app.errors", "it.Problem.retry_after = property(lambda self: None, lambda *_: None)"),
    ),
    "blocked": Plant(
        "chaos",
        ("R18", "R1"),
        _patch(
            "app.api.problems",
            """
respond = it.respond
def slow(*arguments):
    time.sleep(0.3)
    return respond(*arguments)
it.respond = slow
""",
        ),
    ),
    "frozen": Plant("chaos", ("R5 live",), _patch("app.engine.process", _SLOW_FUNERAL.format("time.sleep(8)"))),
    "silent": Plant(
        "chaos", ("R5 seen",), _patch("app.engine.process", _SLOW_FUNERAL.format("await asyncio.sleep(8)"))
    ),
    "late again": Plant("chaos", ("R5 again",), _patch("app.engine.process", "it.BACK_OFF_S = (120.0,) * 7")),
    "uncounted": Plant("chaos", ("R15",), _patch("app.logs", "it.Stderr.take_dropped = lambda self: 0")),
    "orphan": Plant(
        "chaos",
        ("R5b",),
        """
if IS_ENGINE:
    import subprocess
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
""",
    ),
    "selfish": Plant(
        "fleet",
        ("R5 lost",),
        _patch(
            "app.engine.queue", "it.Queue.orphan = lambda self, *_: self.fail_all(it.Problem(it.errors.ENGINE_DIED))"
        ),
    ),
}


def environment(folder: Path, plant: str) -> dict[str, str]:
    """Variables of a server that carries the probe, which writes into this folder, and a plant: its name, or none."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(PROBE + (PLANTS[plant].code if plant else ""))
    return {"PYTHONPATH": str(folder), "CHAOS_DIR": str(folder)}
