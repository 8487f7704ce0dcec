"""What is put into the server's processes from outside, by a sitecustomize on their path: a probe of their memory, and
where it is asked for a planted fault, which must turn a line of the table red."""

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

# By name: what is broken, and the lines that must see it.
PLANTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "leak": (
        """
def leak():
    kept = []
    while True:
        time.sleep(0.5)
        kept.append(bytearray(100_000))
if IS_ENGINE:
    threading.Thread(target=leak, daemon=True).start()
""",
        ("R14 engine",),
    ),
    "leak-http": (
        """
def leak():
    kept = []
    while True:
        time.sleep(0.5)
        kept.append(bytearray(100_000))
if IS_HTTP:
    threading.Thread(target=leak, daemon=True).start()
""",
        ("R14 HTTP",),
    ),
    "descriptors": (
        """
def leak():
    while True:
        time.sleep(1)
        os.open(os.devnull, os.O_RDONLY)
if IS_HTTP:
    threading.Thread(target=leak, daemon=True).start()
""",
        ("R14 descriptors",),
    ),
    "black": (
        """
def change(images):
    encode, count = images.encode, iter(range(10**9))
    images.encode = lambda pixels, *rest: encode(bytes(len(pixels)) if next(count) % 50 == 9 else pixels, *rest)
if IS_HTTP:
    when_imported("app.images", change)
""",
        ("R10", "R11"),
    ),
    "mute": (
        """
def change(queue):
    ticket, count = queue.Ticket.next, iter(range(10**9))
    async def next_(self):
        import asyncio
        if next(count) % 100 == 9:
            await asyncio.sleep(3600)
        return await ticket(self)
    queue.Ticket.next = next_
if IS_HTTP:
    when_imported("app.engine.queue", change)
""",
        ("C1 answered",),
    ),
    "lost": (
        """
def change(queue):
    settle, count = queue.Queue.settle, iter(range(10**9))
    queue.Queue.settle = lambda self, *event: next(count) % 50 == 9 or settle(self, *event)
if IS_HTTP:
    when_imported("app.engine.queue", change)
""",
        ("C1 available",),
    ),
    "miscounted": (
        """
def change(ledger):
    outcome, count = ledger._outcome, iter(range(10**9))
    ledger._outcome = lambda state: "dropped" if next(count) % 50 == 9 else outcome(state)
if IS_HTTP:
    when_imported("app.http.ledger", change)
""",
        ("C1 ledger",),
    ),
    "orphan": (
        """
if IS_ENGINE:
    import subprocess
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
""",
        ("R5b", "R12"),
    ),
    "blocked": (
        """
def change(problems):
    respond = problems.respond
    def slow(*arguments):
        time.sleep(0.3)
        return respond(*arguments)
    problems.respond = slow
if IS_HTTP:
    when_imported("app.api.problems", change)
""",
        ("R18",),
    ),
    "endless": (
        """
if IS_HTTP:
    import signal
    when_imported("uvicorn.server", lambda server: server.HANDLED_SIGNALS and setattr(server, "HANDLED_SIGNALS", ()))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
""",
        ("R12",),
    ),
}


def environment(folder: Path, plant: str | None) -> dict[str, str]:
    """Variables of a server that carries the probe, which writes into this folder, and a plant."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(PROBE + (PLANTS[plant][0] if plant else ""))
    return {"PYTHONPATH": str(folder), "CHAOS_DIR": str(folder)}
