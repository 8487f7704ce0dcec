"""No name leads to a file, and no answer or log line tells what is nobody's business."""

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest

from tests.conftest import PLAIN, ROOT, ServerProcess

CANARY = "canary-5d41402a"  # of a file
WORD = "canary-98f13708"  # of a prompt
TELLING = re.compile(r"Traceback|site-packages|\bat 0x[0-9a-f]+|File \"|" + re.escape(str(ROOT)))
OPENED = """
import os, sys
def hook(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        os.write(opened, os.fsencode(arguments[0]) + b"\\n")
opened = os.open({path!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
sys.addaudithook(hook)
"""


@pytest.fixture(scope="module")
def secret(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("secret") / f"{CANARY}.safetensors"
    path.write_text(CANARY)
    return path


@pytest.fixture(scope="module")
def watched(tmp_path_factory) -> Iterator[ServerProcess]:
    """A server that notes every file that its HTTP process opens, beside its log."""
    folder = tmp_path_factory.mktemp("watched")
    with ServerProcess(folder / "log", first=OPENED.format(path=str(folder / "opened"))) as running:
        yield running


def names(secret: Path) -> list[str]:
    up = "../" * 12
    return [
        str(secret),
        f"{up}{secret}",
        f"{up}{secret}\0.png",
        str(secret).replace("/", "\\"),
        f"file://{secret}",
        f"4step-unet/{up}{secret}",
        f"..%2f..%2f..%2f..%2f..%2f{secret}",
        f"C:\\{secret}",
        f"{secret.stem}" * 20,
    ]


def test_no_name_in_a_path_or_a_body_opens_a_file(watched, secret):
    answers = []
    with httpx.Client(base_url=watched.url, timeout=60, verify=PLAIN) as client:
        for name in names(secret):
            for path in ("/v1/models/", "/static-offline-docs/", "/sdapi/v1/", "/"):
                answers += [client.get(path + quote(name, safe=safe)) for safe in ("", "/%\\")]
            answers += [
                client.post("/generate", json={"prompt": "x", "variant": name}),
                client.post("/v1/images/generations", json={"prompt": "x", "model": name}),
                client.post("/sdapi/v1/options", json={"sd_model_checkpoint": name}),
            ]
    assert {answer.status_code for answer in answers} <= {400, 404, 405, 422}
    assert not any(CANARY in answer.text and "no model" not in answer.text for answer in answers)
    assert CANARY not in (watched.log.parent / "opened").read_text(errors="replace")


def test_neither_answers_nor_log_nor_metrics_tell_of_a_prompt_a_path_or_our_code(watched):
    answers = []
    with httpx.Client(base_url=watched.url, timeout=60, verify=PLAIN) as client:
        for body in (
            {"prompt": WORD, "steps": 1},
            {"prompt": WORD, "steps": 3},
            {"prompt": WORD, "negative_prompt": WORD},
            {"prompt": WORD, "size": "1x1"},
            {"prompt": WORD, "timeout": 0.001},
            {"inputs": WORD, "parameters": {"num_inference_steps": 1}},
        ):
            for path in ("/generate", "/v1/images/generations", "/sdapi/v1/txt2img", "/"):
                answers.append(client.post(path, json=body))
        answers += [client.get(path) for path in ("/metrics", "/ready", "/v1/models", "/openapi.json", "/nothing")]
        answers += [client.post("/generate", content=content) for content in (b"\xff", b"{" * 1000, b"")]
    log = watched.log.read_text()
    assert WORD not in log
    for text in (log, *(answer.text for answer in answers if not answer.headers["content-type"].startswith("image"))):
        assert not TELLING.search(text), text[:300]
    for answer in answers:
        is_told = answer.status_code == 200 and "/sdapi/" in str(answer.url)  # whose infotext begins with the prompt
        assert is_told or WORD.encode() not in answer.content
