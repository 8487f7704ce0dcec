"""The rules of the house, as tests (docs/structure.md has the map)."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"app", "models", "distill", "bench", "tests"}
MAY_IMPORT = {"models": {"models"}, "distill": {"models", "distill"}, "app": {"app", "models"}}
HTTP_SIDE = (
    "fleet",
    "admission",
    "queue",
    "process",
    "messages",
    "wire",
    "jobs",
    "costs",
    "scheduler",
    "placement",
    "flight",
    "gpus",
)
DEVICE_SIDE = ("worker", "load", "cores", "warmup", "loop", "calls", "work", "loading", "upgrade")
ROUTES = {f"app.api.{name}" for name in ("generate", "openai", "models", "loras", "a1111", "huggingface", "health")}
ASKS_FOR_A_GPU = re.compile(r"""torch\.cuda|\.is_cuda|[!=]= ?["']cuda""")


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in (ROOT / folder).rglob("*.py")]


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def starts(names: set[str], *prefixes: str) -> set[str]:
    return {name for name in names if any(name == each or name.startswith(f"{each}.") for each in prefixes)}


def test_the_http_side_runs_without_torch():
    code = "import sys, app.main, app.http.server, app.cli; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_data_flows_one_way(folder):
    for path in sources(folder):
        ours = {name.split(".")[0] for name in imports(path)} & OURS
        assert ours <= MAY_IMPORT[folder], f"{path} imports {ours - MAY_IMPORT[folder]}"


def test_the_engine_knows_no_web_framework_and_no_api():
    for path in sources("app/engine"):
        assert not starts(imports(path), "fastapi", "starlette", "app.api", "app.http", "app.order"), path
    for name in HTTP_SIDE:
        assert not starts(
            imports(ROOT / "app" / "engine" / f"{name}.py"), *(f"app.engine.{each}" for each in DEVICE_SIDE)
        )
    rooms = {path.stem for path in sources("app/engine")} - {"__init__"}
    assert rooms == {*HTTP_SIDE, *DEVICE_SIDE}


def test_the_http_room_knows_no_api_and_an_api_knows_no_other_apis_routes():
    for path in sources("app/http"):
        assert not starts(imports(path), "app.api"), path
    for path in sources("app/api"):
        own = f"app.api.{path.stem}"
        assert not starts(imports(path), *ROUTES - {own}), path


def test_errors_import_nothing_of_ours():
    assert not starts(imports(ROOT / "app" / "errors.py"), *OURS)


def test_policy_is_pure():
    for name in ("scheduler", "costs", "admission", "placement", "jobs"):
        assert not starts(imports(ROOT / "app" / "engine" / f"{name}.py"), "torch", "asyncio", "time", "random")


def test_one_kind_of_device_is_nobodys_business_but_its_own_rooms():
    """models/cpu and models/gpu are entered through load.py and upgrade.py, and one place asks which of them it is."""
    asked = []
    for path in sources("app", "models"):
        room = path.relative_to(ROOT).as_posix()
        if room.startswith(("models/cpu/", "models/gpu/")):
            continue
        if room not in ("app/engine/load.py", "app/engine/upgrade.py"):
            assert not starts(imports(path), "models.cpu", "models.gpu"), path
        asked += [room for line in path.read_text().splitlines() if ASKS_FOR_A_GPU.search(line)]
    assert asked == ["app/engine/load.py"]


def test_no_deadline_knows_the_wall_clock():
    """It jumps; only what is told to people reads it: an answer's date, a line of the log, a span."""
    reads = re.compile(r"\btime\.time(_ns)?\(|datetime\.(now|utcnow|today)\(|\b(gm|local|c)time\(|from time import")
    found = {path.relative_to(ROOT).as_posix() for path in sources("app", "models") if reads.search(path.read_text())}
    assert found == {"app/api/generate.py", "app/api/openai.py", "app/marking.py", "app/traces.py"}


def test_every_test_that_the_promises_name_is_there():
    told = (ROOT / "docs" / "reliability.md").read_text()
    there = {path.stem for path in sources("tests")}
    for path in sources("tests"):
        there |= set(re.findall(r"^(?:async )?def (test_\w+)", path.read_text(), re.MULTILINE))
    whole = set(re.findall(r"(?<![.\w])test_\w+(?!\w|\.\.\.)", told))
    ends = set(re.findall(r"\.\.\.(_\w+)(?!\w|\.\.\.)", told))
    assert whole
    assert not whole - there
    assert not {end for end in ends if not any(name.endswith(end) for name in there)}


def test_no_file_is_longer_than_a_reader_can_hold():
    for path in sources("app", "models", "distill", "bench"):
        assert len(path.read_text().splitlines()) <= 320, path


def test_what_is_allowed_is_what_was_tested():
    """The lowest version of each dependency is the lock's, but for what a GPU machine brings along."""
    pins = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().lower().replace("_", "-").split())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    floors = dict(re.split(">=|;", re.sub(r"\[.*\]", "", each))[:2] for group in groups for each in group)
    assert {name for name, floor in floors.items() if pins[name] != floor} == {"torch", "transformers"}


def test_nothing_that_serves_can_run_a_pickle_or_remote_code():
    for path in sources("app", "models"):
        assert not imports(path) & {"pickle", "shelve", "marshal", "dill", "yaml"}, path
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert not {ast.unparse(call) for call in calls} & {"eval", "exec", "torch.load"}, path
        assert "trust_remote_code" not in path.read_text(), path
