"""Style LoRAs over HTTP: everybody gets their own, a broken file harms nobody else, a replaced one is another style."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.conftest import APPLE, PLAIN, ServerProcess, eventually
from tests.http.test_generate import images
from tests.models import loras, oracle

PARTS = {part: loras.layers(part)[::-4] for part in loras.PARTS}
STYLES = ("one", "two", "three")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three styles, and files that are none."""
    made = tmp_path_factory.mktemp("loras")
    for seed, name in enumerate(STYLES):
        loras.write(made, name, loras.folded(loras.factors(PARTS, seed)))
    good = loras.kohya(loras.factors({"unet": PARTS["unet"]}, 9))
    loras.write(made, "loha", {key.replace("lora_down.weight", "hada_w1_a"): tensor for key, tensor in good.items()})
    loras.write(made, "sd15", {key: tensor[..., :1] if tensor.ndim else tensor for key, tensor in good.items()})
    (made / "torn.safetensors").write_bytes((made / "one.safetensors").read_bytes()[:-100])
    (made / "no name.safetensors").write_bytes(b"")
    (made / "folder.safetensors").mkdir()
    return made


@pytest.fixture(scope="module")
def styled(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server of these, on the code that users are served by, with room for two styled sets beside its variants."""
    log = tmp_path_factory.mktemp("styled") / "log"
    limits = {"PRELOAD": "4step-unet,2step-unet", "HOST_BUDGET_GIB": str(4.5 * 12.7 / 1024), "THREADS": "2"}
    with ServerProcess(log, COMPILE="1", LORA_DIR=str(folder), **limits) as running:
        yield running


def ask(server: ServerProcess, *names: str, scale: float = 1.0, **fields) -> httpx.Response:
    return server.generate(loras=[{"name": name, "scale": scale} for name in names], **fields)


def test_everybody_gets_their_own_style_and_the_base_stays_what_it_was(styled, folder):
    """30 clients at once, of 3 styles at 2 scales and of none, where two styled sets fit into memory."""
    before = images(styled.generate())[0]
    kinds = [(name, scale) for name in STYLES for scale in (0.8, -0.5)] + [("", 0.0)] * 4
    truth = {}
    for name, scale in set(kinds):
        much = {name: scale} if name else {}
        seeds, prompts = (7, 8, 9), [APPLE["prompt"]] * 3
        truth[name, scale] = (oracle.draw_styled("4step-unet", folder, much, prompts, seeds, "np") * 255).round().int()

    def draw(request: tuple[tuple[str, float], int]) -> np.ndarray:
        (name, scale), seed = request
        named = [{"name": name, "scale": scale}] if name else None
        return images(styled.generate(seed=seed, loras=named, timeout=120))[0]

    asked = [(kind, seed) for seed in (7, 8, 9) for kind in kinds]
    with ThreadPoolExecutor(30) as pool:
        drawn = list(pool.map(draw, asked))
    for picture, (kind, seed) in zip(drawn, asked, strict=True):
        assert abs(picture - truth[kind][seed - 7].numpy()).max() <= 1, (kind, seed)
    assert abs(truth["one", 0.8] - truth["", 0.0]).max() > 30  # that can be seen
    assert (images(styled.generate())[0] == before).all()


def test_a_style_is_the_same_alone_and_beside_one_that_does_nothing(styled):
    alone = images(ask(styled, "one"))[0]
    named = [{"name": "two", "scale": 0}, {"name": "one"}]
    assert (images(styled.generate(loras=named))[0] == alone).all()
    assert (images(ask(styled, "one", scale=0.0))[0] == images(styled.generate())[0]).all()


@pytest.mark.parametrize(
    ("name", "said"), [("loha", "LoHa"), ("sd15", "do not fit"), ("torn", "not a whole safetensors file")]
)
def test_a_broken_file_fails_those_who_name_it_and_says_why(styled, name, said):
    with ThreadPoolExecutor(4) as pool:
        broken, good = pool.submit(ask, styled, "one", name), pool.submit(ask, styled, "one")
        refused = broken.result()
        assert good.result().status_code == 200
    assert (refused.status_code, refused.json()["field"], refused.json()["code"]) == (422, "loras", "bad_style")
    assert said in refused.json()["detail"]
    assert "/" not in refused.json()["detail"]  # no path of the server's
    assert styled.status("/ready") == 200
    assert '"failed"' not in httpx.get(f"{styled.url}/v1/models", verify=PLAIN).text


def test_an_unknown_style_is_refused_with_those_that_there_are(styled):
    refused = ask(styled, "four")
    assert (refused.status_code, refused.json()["field"]) == (422, "loras")
    assert "there is no style four; there are loha, one, sd15, three, torn, two" in refused.json()["detail"]


def test_styles_are_listed(styled):
    listed = httpx.get(f"{styled.url}/v1/loras", verify=PLAIN).json()
    assert listed["object"] == "list"
    assert {row["id"] for row in listed["data"]} == {"one", "two", "three", "loha", "sd15", "torn"}
    assert all(row["object"] == "lora" and row["size"] > 0 and row["created"] > 0 for row in listed["data"])


def test_a_new_file_is_a_style_and_a_replaced_one_is_another(styled, folder):
    before = images(ask(styled, "one"))[0]
    loras.write(folder, "late", loras.folded(loras.factors(PARTS, 0)))  # as "one" is
    assert eventually(lambda: ask(styled, "late").status_code == 200, 10)
    assert (images(ask(styled, "late"))[0] == before).all()
    other = loras.folded(loras.factors(PARTS, 5))
    times = os.stat(folder / "late.safetensors")
    loras.write(folder, "late", other)  # in its place, of the same size
    os.utime(folder / "late.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns))
    changed = images(ask(styled, "late"))[0]
    assert abs(changed - before).max() > 30
    loras.write(folder, "next", loras.folded(loras.factors(PARTS, 0)))
    (folder / "next.safetensors").rename(folder / "late.safetensors")  # moved over it
    assert (images(ask(styled, "late"))[0] == before).all()
    (folder / "late.safetensors").unlink()
    assert ask(styled, "late").status_code == 422


def test_a_style_that_cannot_come_in_time_is_told_so_and_nothing_is_lost(styled, folder):
    for name in ("a", "b", "c"):
        loras.write(folder, f"slow-{name}", loras.folded(loras.factors(PARTS, 20)))
    assert eventually(lambda: ask(styled, "slow-a").status_code == 200, 10)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda name: ask(styled, f"slow-{name}", timeout=0.02), "bcbcbcbc"))
    assert {answer.status_code for answer in answers} <= {200, 422, 429, 503, 504}
    assert all(answer.json().get("field") in ("timeout", None) for answer in answers if answer.status_code != 200)
    assert eventually(lambda: styled.in_engine() == 0)


def test_metrics_say_whether_styles_were_added_and_never_which(styled):
    ask(styled, "one")
    text = httpx.get(f"{styled.url}/metrics", verify=PLAIN).text
    assert 'sdxl_images_total{styled="true",variant="4step-unet"}' in text
    assert "one" not in [part.strip('"') for line in text.splitlines() for part in line.split("=")[1:]]


def test_a_picture_tells_its_styles(styled):
    response = httpx.post(
        f"{styled.url}/generate",
        json={**APPLE, "loras": [{"name": "two", "scale": 0.25}, {"name": "one"}]},
        headers={"accept": "image/png"},
        verify=PLAIN,
    )
    assert b"Styles: one:1 two:0.25" in response.content
