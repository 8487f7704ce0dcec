"""The command line, as a person types it."""

import hashlib
import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest
import torch
from PIL import Image, ImageStat
from safetensors.torch import load_file, save_file

from app.cli import main
from tests.conftest import ROOT
from tests.models import oracle


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "app.cli", *arguments]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, cwd=ROOT)


def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The same in this process, which has torch imported already."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["sdxl-lightning", *arguments])
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            main()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
            if isinstance(ended.code, str):
                print(ended.code, file=err)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def test_generate_draws_a_prompt_into_a_file(tmp_path):
    done = run("generate", "a red apple on a blue background", "--seed", "7", "--output", str(tmp_path / "apple.png"))
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "apple.png") as picture:
        assert picture.size == (128, 128)


def test_generate_draws_over_a_picture_where_its_mask_is_white(tmp_path):
    image, mask, output = (tmp_path / name for name in ("image.png", "mask.png", "x.png"))
    Image.fromarray(oracle.IMAGE.numpy()).save(image)
    Image.fromarray(oracle.MASK.numpy()).save(mask)
    over = ("--image", str(image), "--mask", str(mask), "--output", str(output), "--seed", "3")
    done = call("generate", "a red apple", "--strength", "0.8", *over)
    assert done.returncode == 0, done.stderr
    with Image.open(output) as picture:
        differs = (torch.from_numpy(np.asarray(picture).copy()) != oracle.IMAGE).any(dim=2)
        assert "Denoising strength: 0.75" in picture.text["parameters"]
    assert not differs[oracle.MASK == 0].any()
    assert differs[oracle.MASK == 255].any()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--strength", "0.5"), "strength needs an image"),
        (("--image", "README.md"), "README.md: image is no whole PNG"),
        (("--image", "nowhere.png"), "nowhere.png cannot be read"),
    ],
)
def test_generate_says_what_is_wrong_with_a_picture(flags, said):
    refused = call("generate", "x", *flags)
    assert (refused.returncode, said in refused.stderr, "Traceback" in refused.stderr) == (1, True, False)


def test_generate_draws_with_styles(tmp_path):
    """Lines on paper have next to no colour; a red apple has."""
    colour = {}
    for name, styles in (("plain", ()), ("line", ("--lora", "line:0.9"))):
        done = call("generate", "a red apple", "--seed", "7", *styles, "--output", str(tmp_path / f"{name}.png"))
        assert done.returncode == 0, done.stderr
        with Image.open(tmp_path / f"{name}.png") as picture:
            colour[name] = ImageStat.Stat(picture.convert("HSV")).mean[1]
            assert picture.info["parameters"].endswith("Styles: line:0.9") == (name == "line")
    assert colour["line"] < colour["plain"] / 3


@pytest.mark.parametrize(
    ("lora", "said"),
    [("nowhere", "there is no style nowhere; there are line"), ("line:x", "must be a number"), ("line:3", "-2")],
)
def test_generate_says_what_is_wrong_with_a_style(tmp_path, lora, said):
    refused = call("generate", "x", "--lora", lora, "--output", str(tmp_path / "x.png"))
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1), refused.stderr
    assert said in refused.stderr


def test_generate_says_what_is_wrong(tmp_path):
    assert "must end in" in call("generate", "x", "--output", str(tmp_path / "x.gif")).stderr
    assert "8step-lora" in call("generate", "x", "--variant", "3step-unet").stderr


def test_generate_judges_its_output_before_it_draws(tmp_path):
    refused = run("generate", "x", "--output", str(tmp_path / "nowhere" / "x.png"))
    assert (refused.returncode, "cannot be written" in refused.stderr, "Traceback" in refused.stderr) == (
        1,
        True,
        False,
    )


def test_a_prompt_is_taken_as_it_is_typed_and_an_upper_case_suffix_too(tmp_path):
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for prompt, environment in (("null", {}), ("café", ascii_only)):
        done = run("generate", prompt, "--output", str(tmp_path / "x.PNG"), **environment)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("prompt", ["", " \u200b", "\u2028\ufe0f", "caf\udce9", "a" * 2001])
def test_a_prompt_that_no_server_would_take_is_a_sentence(prompt):
    refused = call("generate", "--", prompt)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), refused.stderr
    assert refused.stderr.startswith("--prompt=")


def test_an_undefined_picture_is_never_written(embedded_copy, tmp_path):
    path = embedded_copy / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({key: value * 0 for key, value in load_file(path).items()}, path)
    output = tmp_path / "x.png"
    refused = call("generate", "x", "--output", str(output), MODEL_DIR=str(embedded_copy))
    assert (refused.returncode, output.exists()) == (1, False)
    assert "no picture was written" in refused.stderr


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("MODEL", "gpt-4"),
        ("SDXL_PORT", "tcp://10.0.0.1:80"),
        ("DEVICE", "cuda:0"),
        ("LOG_LEVEL", "Loud"),
        ("HOST_BUDGET_GIB", "inf"),
        ("ROOT_PATH", "http://x"),
        ("ALLOWED_ORIGINS", "https://a.example/"),
        ("ALLOWED_HOSTS", "a.example,http://b.example"),
        ("MODEL_ALIASES", "gpt-image-1=9step-unet"),
    ],
)
def test_a_wrong_setting_is_one_sentence_with_its_variable_and_its_value(variable, value):
    refused = call("serve", **{variable: value})
    assert refused.returncode == 2
    assert refused.stderr.lower().startswith(f"{variable}={value!r}: ".lower()), refused.stderr
    assert refused.stderr.count("\n") == 1


def test_a_host_that_is_no_address_is_named():
    refused = run("serve", HOST="no.such.name.invalid")
    assert (refused.returncode, "HOST='no.such.name.invalid'" in refused.stderr) == (1, True)


def test_a_name_with_our_prefix_wins_and_home_is_expanded():
    shown = run("models", "verify", "4step-unet", MODEL="gpt-4", SDXL_MODEL="embedded", MODEL_DIR="~/m", HOME="/h/ü")
    assert "is not in /h/ü/m" in shown.stdout, shown.stdout + shown.stderr


def test_a_uid_without_a_name_or_a_home_gets_a_temporary_cache():
    code = "import os, app.settings as s; os.setuid(12345); print(s.Settings().engine_config().cache)"
    bare = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    if os.getuid() != 0:
        pytest.skip("only root may take another uid")
    done = subprocess.run([sys.executable, "-c", code], env=bare, capture_output=True, text=True, cwd="/")
    assert "sdxl-lightning-" in done.stdout, done.stderr
    os.rmdir(done.stdout.strip())


def test_models_are_listed_and_verified():
    assert call("models", "list").stdout.count("here") == 7
    verified = call("models", "verify")
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
    verified = call("models", "verify", MODEL_DIR=str(embedded_copy))
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
    done = call("generate", "a red apple", "--output", str(tmp_path / "x.png"), MODEL_DIR=str(embedded_copy))
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


class Gated(Hub):
    """Answers as for a repository that wants a login."""

    def do_GET(self) -> None:
        """Refuse."""
        self.send_response(401)
        self.send_header("X-Error-Code", "GatedRepo")
        self.end_headers()

    do_HEAD = do_GET


def test_models_fetch_says_what_the_hub_or_the_disk_said(tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), Gated) as hub:
        Thread(target=hub.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{hub.server_port}"
        where = {"MODEL": "sdxl", "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
        gated = run("models", "fetch", "4step-lora", HF_HOME=str(tmp_path), **where)
        hub.shutdown()
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as hub:
        Thread(target=hub.serve_forever, daemon=True).start()
        where["HF_ENDPOINT"] = f"http://127.0.0.1:{hub.server_port}"
        no_disk = run("models", "fetch", "4step-lora", HF_HOME="/proc/nope", **where)
        hub.shutdown()
    for done, cause in ((gated, "127.0.0.1 answered 401"), (no_disk, "/proc/nope")):
        assert done.returncode == 1
        assert cause in done.stdout, done.stdout + done.stderr
        assert "models fetch" not in done.stdout


@pytest.mark.parametrize("command", [(), ("serve",), ("generate",), ("models",)])
def test_help_names_every_command(command):
    shown = run(*command, "--help")
    assert shown.returncode == 0
    assert shown.stdout.startswith("usage: sdxl-lightning")
