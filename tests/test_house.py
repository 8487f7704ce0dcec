"""The rules of the house, as tests."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {"models": {"models"}, "distill": {"models", "distill"}, "app": {"app", "models"}}
OURS = {"app", "models", "distill", "bench", "tests"}


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in (ROOT / folder).rglob("*.py")]


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


def test_the_http_side_runs_without_torch():
    code = "import sys, app.main, app.server, app.cli; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_data_flows_one_way(folder):
    for path in sources(folder):
        ours = {name.split(".")[0] for name in imports(path)} & OURS
        assert ours <= MAY_IMPORT[folder], f"{path} imports {ours - MAY_IMPORT[folder]}"


def test_the_scheduler_is_pure():
    for name in ("scheduler", "costs", "admission", "jobs"):
        assert not imports(ROOT / "app" / "engine" / f"{name}.py") & {"torch", "asyncio", "time"}


def test_nothing_that_serves_can_run_a_pickle_or_remote_code():
    for path in sources("app", "models"):
        assert not imports(path) & {"pickle", "shelve", "marshal", "dill", "yaml"}, path
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert not {ast.unparse(call) for call in calls} & {"eval", "exec", "torch.load"}, path
        assert "trust_remote_code" not in path.read_text(), path
