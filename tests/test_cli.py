"""The command line, as a person types it."""

import os
import subprocess
import sys

import pytest
from PIL import Image

from tests.conftest import ROOT


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "app.cli", *arguments]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, cwd=ROOT)


def test_generate_draws_a_prompt_into_a_file(tmp_path):
    done = run("generate", "a red apple on a blue background", "--seed", "7", "--output", str(tmp_path / "apple.png"))
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "apple.png").size == (128, 128)


def test_generate_says_what_is_wrong(tmp_path):
    assert "must end in" in run("generate", "x", "--output", str(tmp_path / "x.gif")).stderr
    assert "8step-lora" in run("generate", "x", "--variant", "3step-unet").stderr


def test_models_are_listed_and_verified():
    assert run("models", "list").stdout.count("here") == 7
    verified = run("models", "verify")
    assert (verified.returncode, verified.stdout.count(": right")) == (0, 14)


@pytest.mark.parametrize("command", [(), ("serve",), ("generate",), ("models",)])
def test_help_names_every_command(command):
    shown = run(*command, "--help")
    assert shown.returncode == 0
    assert shown.stdout.startswith("usage: sdxl-lightning")
