"""The command line, as a person types it."""

import hashlib
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.conftest import ROOT


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "app.cli", *arguments]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, cwd=ROOT)


def test_generate_draws_a_prompt_into_a_file(tmp_path):
    done = run("generate", "a red apple on a blue background", "--seed", "7", "--output", str(tmp_path / "apple.png"))
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "apple.png") as picture:
        assert picture.size == (128, 128)


def test_generate_says_what_is_wrong(tmp_path):
    assert "must end in" in run("generate", "x", "--output", str(tmp_path / "x.gif")).stderr
    assert "8step-lora" in run("generate", "x", "--variant", "3step-unet").stderr


def test_models_are_listed_and_verified():
    assert run("models", "list").stdout.count("here") == 7
    verified = run("models", "verify")
    assert (verified.returncode, verified.stdout.count(": right")) == (0, 13)


def test_models_verify_looks_at_the_whole_of_every_file(embedded_copy):
    for name, damage in {
        "vae/diffusion_pytorch_model.safetensors": lambda data: data[:-1001] + bytes([data[-1001] ^ 1]),
        "text_encoder/model.safetensors": lambda data: b"\x80\x04K\x01.\0\0\0",  # a pickle
        "unet/config.json": lambda data: data + b" ",
        "sdxl_lightning_4step_unet.safetensors": lambda data: data[:-5000],
        "sdxl_lightning_4step_lora.safetensors": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    }.items():
        path = embedded_copy / name
        path.write_bytes(damage(path.read_bytes()))
    (embedded_copy / "tokenizer_2" / "merges.txt").unlink()
    verified = run("models", "verify", MODEL_DIR=str(embedded_copy))
    lines = dict(line.split(": ", 1) for line in verified.stdout.splitlines())
    wrong = {"vae", "text_encoder", "unet", "4step-unet", "4step-lora", "tokenizer_2"}
    assert (verified.returncode, {name for name, said in lines.items() if said != "right"}) == (1, wrong)


@pytest.mark.parametrize(
    ("file", "tensors", "number", "said"),
    [
        ("sdxl_lightning_4step_unet.safetensors", "conv_in.w", float("nan"), "conv_in.weight has NaN"),
        ("vae/diffusion_pytorch_model.safetensors", "decoder.conv_out.", 0.0, "blank or undefined picture"),
    ],
)
def test_generate_never_writes_an_invalid_picture(embedded_copy, tmp_path, file, tensors, number, said):
    state = load_file(embedded_copy / file)
    for tensor in (tensor for name, tensor in state.items() if name.startswith(tensors)):
        tensor[:] = number
    save_file(state, embedded_copy / file)
    done = run("generate", "a red apple", "--output", str(tmp_path / "x.png"), MODEL_DIR=str(embedded_copy))
    assert (done.returncode, said in done.stderr, (tmp_path / "x.png").exists()) == (1, True, False)
    assert "Traceback" not in done.stderr


class Hub(BaseHTTPRequestHandler):
    """Stands in for the Hugging Face hub: every file of every repository holds the same few bytes."""

    content = b"not what was published"

    def do_GET(self) -> None:
        """Also for HEAD: what huggingface_hub wants to know before it downloads."""
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(self.path.encode()).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.path.split("/resolve/")[1].split("/")[0])
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(self.content)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Nothing."""


def test_models_fetch_downloads_and_refuses_what_is_not_the_published_file(tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as hub:
        Thread(target=hub.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{hub.server_port}"
        where = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
        fetched = run("models", "fetch", "4step-unet", MODEL="sdxl", **where)
        hub.shutdown()
    assert fetched.returncode == 1
    assert "tokenizer: present, not verified" in fetched.stdout, fetched.stdout + fetched.stderr
    assert "4step-unet: sdxl_lightning_4step_unet.safetensors: its SHA-256 is not the published" in fetched.stdout
    assert list(tmp_path.rglob("vocab.json"))
    assert not list(tmp_path.rglob("sdxl_lightning_4step_unet.safetensors"))


@pytest.mark.parametrize("command", [(), ("serve",), ("generate",), ("models",)])
def test_help_names_every_command(command):
    shown = run(*command, "--help")
    assert shown.returncode == 0
    assert shown.stdout.startswith("usage: sdxl-lightning")
