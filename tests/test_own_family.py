"""A user's catalog on the command line: listed, verified, fetched, drawn from; and refused in one sentence."""

import hashlib
import json
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from bench import ldm
from tests.conftest import EMBEDDED
from tests.models.test_own_checkpoints import OWN
from tests.test_cli import Hub, run

FILE = 'file = "own.safetensors"'


def catalog(folder: Path, where: str = FILE, like: str = "embedded") -> dict[str, str]:
    """The settings of a server of it."""
    path = folder / "models.toml"
    path.write_text(OWN.format(like=like, where=where, weights='kind = "unet"'))
    return {"CATALOG": str(path), "MODEL": "own"}


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with a checkpoint of one file."""
    ldm.write(EMBEDDED, EMBEDDED / "sdxl_lightning_4step_unet.safetensors", tmp_path / "own.safetensors")
    return tmp_path


def test_a_checkpoint_of_one_file_is_listed_verified_and_drawn(own):
    assert run("models", "list", **catalog(own)).stdout == "own  4 or 5 steps  here  its own UNet\n"
    digest = hashlib.sha256((own / "own.safetensors").read_bytes()).hexdigest()
    known = f'{FILE}\nsha256 = {{ "own.safetensors" = "{digest}" }}'
    verified = run("models", "verify", **catalog(own, known))
    lines = dict(line.split(": ", 1) for line in verified.stdout.splitlines())
    assert (verified.returncode, lines["unet"], lines["tokenizer"]) == (0, "right", "right"), verified.stdout
    assert lines["vae"] == "in own.safetensors"
    done = run("generate", "a red apple", "--steps", "5", "--output", str(own / "x.png"), **catalog(own))
    assert done.returncode == 0, done.stderr
    with Image.open(own / "x.png") as picture:
        assert picture.size == (128, 128)


class Plain(Hub):
    """Stands in for a hub whose repositories have no files in a half precision of their own."""

    content = len(header := json.dumps({}).encode()).to_bytes(8, "little") + header

    def do_GET(self) -> None:
        """Also for HEAD."""
        if ".fp16." not in self.path:
            return super().do_GET()
        self.send_response(404)
        self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        return None

    do_HEAD = do_GET


def test_a_repository_is_fetched_with_the_files_that_it_has(tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), Plain) as hub:
        Thread(target=hub.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{hub.server_port}"
        where = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
        row = f'repository = {{ id = "me/mine", revision = "{"a" * 40}" }}'
        fetched = run("models", "fetch", **catalog(tmp_path, row, like="sdxl"), **where)
        hub.shutdown()
    assert fetched.returncode == 0, fetched.stdout
    assert [line.split(":")[0] for line in fetched.stdout.splitlines()][-2:] == ["vae", "own"]
    assert "unet: present, not verified" in fetched.stdout
    assert list(tmp_path.rglob("unet/diffusion_pytorch_model.safetensors"))
    assert run("models", "list", **catalog(tmp_path, row, like="sdxl"), **where).stdout.split()[5] == "here"


def test_a_start_that_a_checkpoint_forbids_is_one_sentence(own, start_server):
    state = load_file(own / "own.safetensors")
    old = {key.replace("conditioner.embedders.0.", "cond_stage_model."): tensor for key, tensor in state.items()}
    save_file(old, own / "own.safetensors")
    server = start_server(**catalog(own))
    assert server.process.wait(60) == 1
    (line,) = [line for line in server.log_lines() if line["level"] == "error"]
    said = "family own: own.safetensors cannot be served: it is Stable Diffusion 1 or 2, not SDXL"
    assert line["event"] == f"the engine cannot start: {said}"


@pytest.mark.parametrize(
    ("settings", "code", "said"),
    [
        ({"MODEL": "other"}, 2, "MODEL='other': it must be one of sdxl, embedded, own"),
        ({"MODEL": ""}, 2, "it must be one of sdxl, embedded, own"),
        ({"CATALOG": "/nowhere.toml"}, 1, "CATALOG=/nowhere.toml: No such file or directory"),
        ({"steps": "x"}, 1, "models.toml: family own, variant own: Expected"),
        ({"file": "none.safetensors"}, 1, "none.safetensors of own is not in"),
    ],
)
@pytest.mark.parametrize("command", [("generate", "x"), ("models", "verify")])
def test_what_makes_no_sense_is_one_sentence(own, command, settings, code, said):
    if command[0] == "models" and "file" in settings:
        pytest.skip("verify says it of each part")
    changes = catalog(own, FILE.replace("own.safetensors", settings.get("file", "own.safetensors")))
    path = own / "models.toml"
    if "steps" in settings:
        path.write_text(path.read_text().replace("[4, 5]", '"x"'))
    refused = run(*command, **{**changes, **{key: value for key, value in settings.items() if key.isupper()}})
    assert (refused.returncode, refused.stderr.count("\n"), said in refused.stderr) == (code, 1, True), refused.stderr
