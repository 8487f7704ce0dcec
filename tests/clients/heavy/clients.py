"""The clients that need an environment of their own, unchanged, in their defaults: `make test-clients`.

pytest finds this file only where it is named.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.conftest import EMBEDDED, PLAIN, ROOT, ServerProcess, eventually

HERE, BUILT = Path(__file__).parent, ROOT / "build" / "clients"
PROMPT = "a red apple on a blue background"


def run(*command: object, **environment: str) -> str:
    """A client's standard output. What it keeps goes into a directory of this run, not into the checkout."""
    done = subprocess.run(
        [str(word) for word in command],
        env={**os.environ, "OPENAI_API_KEY": "none", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def python(environment: str) -> Path:
    return BUILT / environment / "bin" / "python"


def node(name: str, server: ServerProcess) -> object:
    script = shutil.copy(HERE / "clients.mjs", BUILT / "npm")
    return json.loads(run("node", script, name, server.url).splitlines()[-1])


def test_openai_npm(server):
    assert node("openai", server) == [128, 128]
    assert node("stream", server)[-1] == ["image_generation.completed", 128]
    assert node("refused", server) == [400, "invalid_request", "num_inference_steps", True]
    assert node("models", server)[0] == "sdxl-lightning"


def test_ai_sdk(server):
    assert node("ai", server) == [["image/png", 128], ["image/png", 128]]


def test_huggingface_npm(server):
    assert node("huggingface", server) == ["image/png", 128]
    assert "not 50" in node("huggingfaceRefused", server)


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm", "litellm_proxy"])
def test_litellm(server, provider):
    code = (
        "import litellm; "
        f"drawn = litellm.image_generation(model='{provider}/4step-unet', prompt='{PROMPT}', n=2, size='1024x1024', "
        f"api_base='{server.url}/v1', api_key='none', seed=7); "
        "print([len(each.b64_json) > 1000 for each in drawn.data])"
    )
    assert run(python("litellm"), "-c", code).splitlines()[-1] == "[True, True]"


def test_llama_index(server, tmp_path):
    code = (
        "from llama_index.tools.openai.image_generation.base import OpenAIImageGenerationToolSpec as Tool; "
        f"print(''.join(Tool(cache_dir='{tmp_path}').image_generation('{PROMPT}', download=True)))"
    )
    file = run(python("litellm"), "-c", code, OPENAI_BASE_URL=f"{server.url}/v1").splitlines()[-1]
    assert Path(file).stat().st_size > 1000
    shown = run(python("litellm"), "-c", code.replace(", download=True", ""), OPENAI_BASE_URL=f"{server.url}/v1")
    assert shown.splitlines()[-1].startswith("data:image/png;base64,")


@pytest.mark.parametrize("streaming", [(), ("--streaming",)])
def test_aiperf(server, tmp_path, streaming):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"text": "a red apple"}\n{"text": "a green pear"}\n')
    run(
        *(BUILT / "aiperf" / "bin" / "aiperf", "profile", "-m", "4step-unet", "--endpoint-type", "image-generation"),
        *("--url", server.url, "--tokenizer", EMBEDDED / "tokenizer", "--input-file", prompts),
        *("--custom-dataset-type", "single_turn", "--request-count", "50", "--concurrency", "4", "--ui", "none"),
        *("--artifact-dir", tmp_path / "artifacts", *streaming),
    )
    (report,) = (tmp_path / "artifacts").rglob("profile_export_aiperf.json")
    found = json.loads(report.read_text())
    assert found["request_count"]["avg"] == 50
    assert found.get("error_request_count", {"avg": 0})["avg"] == 0


def test_sglang_bench(server, tmp_path):
    result = tmp_path / "result.json"
    run(
        *(python("sglang"), "-m", "sglang.multimodal_gen.benchmarks.bench_serving", "--dataset", "random"),
        *("--task", "text-to-image", "--model", "sdxl-lightning", "--num-prompts", "20", "--width", "128"),
        *("--height", "128", "--num-inference-steps", "4", "--base-url", server.url, "--output-file", result),
    )
    assert json.loads(result.read_text())["completed_requests"] == 20


@pytest.fixture(params=["openai", "automatic1111"])
def open_webui(request, server, tmp_path) -> Iterator[str]:
    """Open WebUI without a browser, network or language model, on one of its two engines; its URL."""
    environment = {
        "WEBUI_AUTH": "False",
        "WEBUI_SECRET_KEY": "x",
        "OFFLINE_MODE": "true",
        "HF_HUB_OFFLINE": "1",
        "ENABLE_OLLAMA_API": "false",
        "ENABLE_OPENAI_API": "false",
        "RAG_EMBEDDING_ENGINE": "openai",
        "ENABLE_IMAGE_GENERATION": "true",
        "IMAGE_GENERATION_ENGINE": request.param,
        "DATA_DIR": str(tmp_path),
        "IMAGES_OPENAI_API_BASE_URL": f"{server.url}/v1",
        "IMAGES_OPENAI_API_KEY": "none",
        "AUTOMATIC1111_BASE_URL": server.url,
    }
    url = f"http://127.0.0.1:{8310 + (request.param == 'openai')}"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [BUILT / "openwebui" / "bin" / "open-webui", "serve", "--host", "127.0.0.1", "--port", url.split(":")[-1]],
            env={**os.environ, **environment},
            stdout=log,
            stderr=log,
            cwd=tmp_path,
        )

    def answers() -> bool:
        try:
            return httpx.get(f"{url}/health", verify=PLAIN).status_code == 200
        except httpx.TransportError:
            return False

    try:
        assert eventually(answers, 180), (tmp_path / "log").read_text()[-3000:]
        yield url
    finally:
        process.terminate()
        process.wait(60)


def test_open_webui(open_webui):
    with httpx.Client(base_url=open_webui, timeout=120, verify=PLAIN) as client:
        token = client.post("/api/v1/auths/signin", json={"email": "", "password": ""}).json()["token"]
        client.headers["authorization"] = f"Bearer {token}"
        (picture,) = client.post("/api/v1/images/generations", json={"prompt": PROMPT}).raise_for_status().json()
        assert client.get(picture["url"]).content[:8] == b"\x89PNG\r\n\x1a\n"
