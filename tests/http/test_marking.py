"""Signed pictures (C2PA) and the operator's check of pictures, through a real server and the real command."""

import base64
import io
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import c2pa
import httpx
import numpy as np
import pytest
from openai import APIError, BadRequestError, OpenAI
from PIL import Image

from app.errors import Problem
from app.marking import Signer
from tests.certificates import Authority
from tests.conftest import APPLE, PLAIN, ServerProcess
from tests.test_cli import run

SOURCE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
KINDS = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


class Marking:
    """A server that signs, with a certificate that expires in 13 days, and checks."""

    def __init__(self, folder: Path) -> None:
        self.authority = Authority(folder)
        self.pair = self.authority.pair("Signer", days=13)
        settings = {"CHECK": "tests.hook:look", "CHECK_TIMEOUT_S": "2"}
        self.process = ServerProcess(folder / "log", **self.pair, **settings)

    def generate(self, **fields: object) -> httpx.Response:
        return self.process.generate(**{"steps": 1, **fields})

    def files(self, **fields: object) -> list[bytes]:
        answer = self.generate(**fields)
        assert answer.status_code == 200, answer.text
        return [base64.b64decode(image["b64_json"]) for image in answer.json()["images"]]


@pytest.fixture(scope="module")
def marking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Marking]:
    running = Marking(tmp_path_factory.mktemp("marking"))
    with running.process:
        yield running


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def pixels(file: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(file)) as image:
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.mark.parametrize("kind", KINDS)
def test_every_picture_is_signed_as_made_by_a_model_and_keeps_the_iptc_mark(marking, kind):
    for file in marking.files(output_format=kind, n=2):
        trust = {"trust": {"trust_anchors": marking.authority.root.read_text()}}
        context = c2pa.Context.from_dict(trust)
        with c2pa.Reader(KINDS[kind], io.BytesIO(file), context=context) as reader:
            found = json.loads(reader.json())
        assert found["validation_state"] == "Trusted"
        (manifest,) = found["manifests"].values()
        (action,) = manifest["assertions"][0]["data"]["actions"]
        assert (action["action"], action["digitalSourceType"]) == ("c2pa.created", SOURCE)
        assert APPLE["prompt"].encode() not in file
        with Image.open(io.BytesIO(file)) as image:
            assert "trainedAlgorithmicMedia" in str(image.info.get("xmp") or image.info.get("XML:com.adobe.xmp"))


def test_a_signed_file_of_the_same_seed_has_the_same_pixels_not_the_same_bytes(marking):
    (first,), (second,) = marking.files(seed=3), marking.files(seed=3)
    assert first != second
    assert (pixels(first) == pixels(second)).all()


def test_a_bare_picture_and_one_of_another_api_are_signed_too(marking, tmp_path):
    bare = httpx.post(f"{marking.process.url}/generate", json=APPLE, headers={"accept": "image/png"}, timeout=60)
    theirs = httpx.post(f"{marking.process.url}/v1/images/generations", json={"prompt": "a red apple"}, timeout=60)
    for name, file in (("bare", bare.content), ("openai", base64.b64decode(theirs.json()["data"][0]["b64_json"]))):
        path = tmp_path / f"{name}.png"
        path.write_bytes(file)
        assert "C2PA: valid" in run("verify", str(path)).stdout


def test_verify_tells_valid_from_trusted_and_from_changed(marking, tmp_path, server):
    (signed,) = marking.files()
    path = tmp_path / "signed.png"
    path.write_bytes(signed)
    valid = run("verify", str(path))
    assert (valid.returncode, "valid, but nobody trusted vouches" in valid.stdout) == (0, True), valid.stderr
    assert "IPTC: made by a trained model" in valid.stdout
    trusted = run("verify", str(path), "--trust", str(marking.authority.root))
    assert (trusted.returncode, "valid, trusted; signed by Signer (Tests)" in trusted.stdout) == (0, True)
    changed = bytearray(signed)
    changed[-30] ^= 1
    path.write_bytes(changed)
    broken = run("verify", str(path), "--trust", str(marking.authority.root))
    assert (broken.returncode, "not valid: assertion.dataHash.mismatch" in broken.stdout) == (1, True), broken.stdout
    path.write_bytes(base64.b64decode(server.generate().json()["images"][0]["b64_json"]))
    unsigned = run("verify", str(path))
    assert unsigned.stdout == "IPTC: made by a trained model\nC2PA: no manifest\n"
    Image.new("RGB", (8, 8)).save(path)
    assert (run("verify", str(path)).returncode, run("verify", "README.md").returncode) == (1, 1)


def test_two_weeks_before_it_expires_a_certificate_is_in_the_metrics_and_the_log(marking):
    expires = marking.process.metrics()["sdxl_c2pa_certificate_expiry_timestamp_seconds"]
    assert timedelta(days=12) < datetime.fromtimestamp(expires, UTC) - datetime.now(UTC) < timedelta(days=14)
    warnings = [line for line in marking.process.log_lines() if "expires on" in line["event"]]
    assert [line["level"] for line in warnings] == ["warning"]


@pytest.mark.parametrize("why", ["no picture", "expired"])
def test_a_picture_that_cannot_be_signed_is_not_sent(marking, why):
    """A running server's signer is asked directly: its certificate runs out in days."""
    signer = Signer(*map(Path, marking.pair.values()))
    file = b"no picture" if why == "no picture" else png(Image.new("RGB", (8, 8)))
    if why == "expired":
        signer.expires = datetime.now(UTC)
    with pytest.raises(Problem) as refused:
        signer.sign(file, "image/png")
    assert (refused.value.cause.status, refused.value.cause.code) == (500, "signing_failed")


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("expired", "expired on"),
        ("by itself", "self-signed"),
        ("another key", "cannot sign"),
        ("no key", "go together"),
        ("junk", "no certificate"),
    ],
)
def test_a_server_does_not_start_with_a_certificate_that_cannot_sign(tmp_path, what, why):
    authority = Authority(tmp_path)
    pair = authority.pair("a", days=-1 if what == "expired" else 30, vouched=what != "by itself")
    if what == "another key":
        pair["C2PA_KEY"] = authority.pair("b")["C2PA_KEY"]
    if what == "no key":
        del pair["C2PA_KEY"]
    if what == "junk":
        Path(pair["C2PA_CERT"]).write_text("junk")
    refused = run("serve", **pair)
    assert (refused.returncode, why in refused.stderr, refused.stderr.count("\n")) == (2, True, 1), refused.stderr


def test_a_flag_is_in_the_answer_of_every_api(marking):
    flagged = marking.generate(prompt="flag this apple")
    assert (flagged.json()["images"][0]["flagged"], flagged.headers["x-check"]) == (True, "flag")
    body = {"prompt": "flag this apple", "num_inference_steps": 1}
    theirs = httpx.post(f"{marking.process.url}/v1/images/generations", json=body, timeout=60, verify=PLAIN)
    assert theirs.json()["data"][0]["flagged"] is True
    passed = marking.generate()
    assert "flagged" not in passed.json()["images"][0]
    assert "x-check" not in passed.headers


def test_what_the_check_refuses_is_a_named_error_of_each_api_and_no_picture(marking):
    refused = marking.generate(prompt="refuse this apple")
    assert (refused.status_code, refused.json()["code"]) == (422, "picture_refused")
    theirs = {
        "": {"inputs": "refuse this apple"},
        "sdapi/v1/txt2img": {"prompt": "refuse this apple", "steps": 1},
    }
    for path, body in theirs.items():
        answer = httpx.post(f"{marking.process.url}/{path}", json=body, timeout=60, verify=PLAIN)
        assert (answer.status_code, answer.json()["code"]) == (422, "picture_refused")
    with OpenAI(base_url=f"{marking.process.url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(BadRequestError) as error:
            client.images.generate(prompt="refuse this apple")
        assert error.value.code == "content_policy_violation"
        with pytest.raises(APIError, match="refused what was drawn"):
            list(client.images.generate(prompt="refuse this apple", stream=True, partial_images=1))


def test_the_check_sees_a_picture_with_what_its_mask_keeps(marking):
    """The hook refuses what is mostly red where the prompt says so; only the client's own pixels are."""
    image, mask = Image.new("RGB", (128, 128), "red"), Image.new("L", (128, 128))
    mask.paste(255, (0, 0, 1, 1))
    files = {name: (name, png(each)) for name, each in (("image", image), ("mask", mask))}
    fields = {"prompt": "no red an apple", "steps": "1"}
    answer = httpx.post(f"{marking.process.url}/generate", data=fields, files=files, timeout=60, verify=PLAIN)
    assert (answer.status_code, answer.json().get("code")) == (422, "picture_refused")


@pytest.mark.parametrize("prompt", ["raise", "leave", "nonsense", "hang"])
def test_a_check_that_fails_or_hangs_lets_no_picture_through(marking, prompt):
    failed = marking.generate(prompt=f"{prompt} an apple")
    assert (failed.status_code, failed.json()["code"]) == (500, "check_failed")
    assert marking.generate().status_code == 200
    assert marking.process.metrics()['sdxl_checks_total{verdict="failed"}'] >= 1


async def test_a_check_may_fail_open():
    from app.check import Check, load
    from app.metrics import Metrics

    metrics = Metrics()
    check = Check(load("tests.hook:look"), 5.0, fails_open=True, metrics=metrics)
    assert not await check.is_flagged(bytes(3), 1, 1, "raise")
    assert metrics.registry.get_sample_value("sdxl_checks_total", {"verdict": "failed"}) == 1


@pytest.mark.parametrize("name", ["tests.hook", "tests.hook:none", "no.such.module:look", "tests.hook:np"])
def test_a_server_does_not_start_with_a_check_that_it_cannot_find(name):
    refused = run("serve", CHECK=name)
    assert (refused.returncode, f"CHECK={name!r}" in refused.stderr, refused.stderr.count("\n")) == (2, True, 1)
