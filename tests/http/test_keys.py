"""Keys and origins, over HTTP: who is served, what is open, what a key may ask, and which names and pages are known."""

import base64
import http.client
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from fastapi.routing import iter_route_contexts
from hypothesis import given
from hypothesis import strategies as st

from app import keys
from app.http.keys import MINUTE, Bucket
from app.main import create_app
from app.settings import Settings
from tests.conftest import APPLE, PLAIN, ROOT, ServerProcess, eventually

OPEN = {"/live", "/ready", "/health"}
PAGE = "https://page.example"
RPM = 5


class Guarded:
    """A server with keys, a port for metrics, and one page of another origin that may use it."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "keys.toml"
        self.secret = {name: keys.add(self.file, name, rpm, None) for name, rpm in (("anna", None), ("rita", RPM))}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.admin = f"http://127.0.0.1:{probe.getsockname()[1]}"
        settings = {
            "ADMIN_PORT": self.admin.rsplit(":")[-1],
            "ALLOWED_ORIGINS": PAGE,
            "ALLOWED_HOSTS": "*.here.example",
        }
        self.process = ServerProcess(folder / "log", API_KEYS_FILE=str(self.file), **settings)
        self.url = self.process.url

    def metrics(self) -> str:
        return httpx.get(f"{self.admin}/metrics", verify=PLAIN, timeout=60).text

    def generate(self, name: str, **headers: str) -> httpx.Response:
        return self.post({"authorization": f"Bearer {self.secret[name]}", **headers})

    def post(self, headers: dict[str, str]) -> httpx.Response:
        return httpx.post(f"{self.url}/generate", json={**APPLE, "steps": 1}, headers=headers, timeout=60, verify=PLAIN)

    def ask(self, method: str, target: str, headers: dict[str, str]) -> int:
        """A request whose target is sent as it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.process.port, timeout=30)
        connection.putrequest(method, target, skip_host="host" in headers)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        with connection.getresponse() as response:
            connection.close()
            return response.status


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    running = Guarded(tmp_path_factory.mktemp("keys"))
    with running.process:
        yield running


def test_every_route_wants_a_key_but_those_that_the_documentation_says_are_open(guarded):
    app = create_app(Settings(api_keys_file=guarded.file))
    routes = [(each.path, method) for each in iter_route_contexts(app.routes) for method in each.methods or {"GET"}]
    assert len(routes) > 8
    opened = set()
    page = [("/", "GET"), ("/web/{name}", "GET")]  # files alone
    for path, method in [each for each in routes if each not in page]:
        path = path.replace("{name}", "4step-unet")
        targets = [path, f"/{path}", f"{path}/", f"{path}?a=/live", f"{path};/live", path.replace("/", "/%2e/", 1)]
        targets += [
            path.upper(),
            f"/live/..{path}",
            f"/live%2f..{path}",
            f"http://localhost/live/..{path}",
            f"{path}%00",
        ]
        for target in targets:
            for verb in {method, "HEAD", "OPTIONS", "POST", "get"}:
                for headers in (
                    {},
                    {"authorization": "Bearer sdxl_wrong"},
                    {"authorization": "Bearer "},
                    {"x-forwarded-for": "127.0.0.1", "x-forwarded-prefix": "/live", "x-original-url": "/live"},
                ):
                    if path == "/" and verb in ("HEAD", "get"):
                        continue
                    if guarded.ask(verb, target, headers) not in (400, 401):
                        opened.add(target.split("?")[0].split(";")[0])
        for host in ("localhost/live?", "localhost/live#", "evil.example", "localhost:80@evil.example"):
            assert guarded.ask(method, path, {"host": host}) in (401, 403)
    assert opened == OPEN


@pytest.mark.parametrize("scheme", ["Bearer {}", "bearer  {}", "Basic {basic}"])
def test_a_key_is_a_bearer_token_or_the_password_of_basic(guarded, scheme):
    secret = guarded.secret["anna"]
    basic = base64.b64encode(f"user:{secret}".encode()).decode()
    header = {"authorization": scheme.format(secret, basic=basic)}
    assert guarded.post(header).status_code == 200
    assert httpx.get(f"{guarded.url}/v1/models", headers=header, verify=PLAIN, timeout=60).status_code == 200


@pytest.mark.parametrize(
    ("authorization", "code"),
    [
        (None, "missing_api_key"),
        ("Bearer sdxl_wrong", "invalid_api_key"),
        ("Basic Og==", "invalid_api_key"),
        ("Basic !", "invalid_api_key"),
        ("Bearer \xff", "invalid_api_key"),
    ],
)
def test_who_has_no_key_is_told_what_to_send(guarded, authorization, code):
    refused = guarded.post({} if authorization is None else {"authorization": authorization.encode("latin-1")})
    assert (refused.status_code, refused.json()["code"], refused.headers["www-authenticate"]) == (401, code, "Bearer")
    assert refused.headers["content-type"] == "application/problem+json"


def test_fifty_threads_get_no_more_than_a_keys_rate_and_are_told_when_to_come_back(guarded):
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda _: guarded.generate("rita"), range(50)))
    served = [answer for answer in answers if answer.status_code == 200]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(served) + len(refused) == 50
    assert RPM <= len(served) <= RPM + 1 + max(answer.elapsed.total_seconds() for answer in answers) * RPM / 60
    assert {answer.json()["code"] for answer in refused} == {"rate_limited"}
    assert all(1 <= int(answer.headers["retry-after"]) <= 60 / RPM for answer in refused)
    assert {answer.headers["ratelimit-policy"] for answer in answers} == {f'"requests";q={RPM};w=60'}
    assert min(answer.headers["ratelimit"] for answer in answers).startswith('"requests";r=0;t=')
    assert guarded.generate("anna").status_code == 200


def test_a_key_is_named_in_log_and_metrics_and_shown_nowhere(guarded):
    answer = guarded.generate("anna", **{"x-request-id": "named-once"})
    assert "ratelimit" not in answer.headers
    assert 'sdxl_key_requests_total{key="anna",outcome="ok"}' in guarded.metrics()
    guarded.post({"authorization": "Bearer sdxl_leaked"})
    assert "sdxl_requests_without_key_total" in guarded.metrics()

    def lines(request):
        return [line for line in guarded.process.log_lines() if line.get("id") == request]

    assert eventually(lambda: lines("named-once"))
    assert lines("named-once")[0]["key"] == "anna"
    told = guarded.process.log.read_text() + guarded.metrics()
    assert not [secret for secret in (*guarded.secret.values(), "sdxl_leaked") if secret in told]


def test_a_changed_file_is_read_while_requests_come_and_a_wrong_one_changes_nothing(guarded):
    before = guarded.file.read_text()
    new = keys.add(guarded.file, "newcomer", None, None)
    header = {"authorization": f"Bearer {new}"}
    assert eventually(lambda: guarded.post(header).status_code == 200, 10)
    guarded.file.write_text("[[key]\nname = half a file")
    log = guarded.process.log
    assert eventually(lambda: guarded.post(header).status_code == 200 and "stay as they were" in log.read_text(), 10)
    assert 'key="newcomer"' in guarded.metrics()
    guarded.file.write_text(before)
    assert eventually(lambda: guarded.post(header).status_code == 401, 10)
    assert 'key="newcomer"' not in guarded.metrics()
    assert guarded.generate("anna").status_code == 200


def test_metrics_have_a_port_of_their_own_for_this_machine_only(guarded):
    assert "sdxl_ready 1.0" in guarded.metrics()
    assert httpx.head(f"{guarded.admin}/metrics", verify=PLAIN, timeout=60).status_code == 200
    assert httpx.get(f"{guarded.admin}/v1/models", verify=PLAIN, timeout=60).status_code == 404
    key, evil = {"authorization": f"Bearer {guarded.secret['anna']}"}, {"host": "evil.example"}
    assert httpx.get(f"{guarded.url}/metrics", headers=key, verify=PLAIN, timeout=60).status_code == 404
    assert httpx.get(f"{guarded.admin}/metrics", headers=evil, verify=PLAIN, timeout=60).status_code == 403


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *((name, 200) for name in ("localhost", "LOCALHOST.:80", "a.localhost", "127.0.0.1", "[::1]:8000", "10.0.0.7")),
        ("gpu.here.example:8000", 200),
        *(
            (name, 403)
            for name in ("evil.example", "here.example.evil.example", "localhost.evil.example", "127.0.0.1.x")
        ),
    ],
)
def test_only_names_of_this_server_are_answered_on_loopback(guarded, host, status):
    assert guarded.ask("GET", "/live", {"host": host}) == status


def test_a_page_that_is_allowed_gets_through_with_all_that_its_sdk_needs(guarded):
    preflight = {
        "origin": PAGE,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-os,x-stainless-retry-count",
    }
    allowed = httpx.options(f"{guarded.url}/generate", headers=preflight, verify=PLAIN)
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, PAGE)
    assert "x-stainless-os" in allowed.headers["access-control-allow-headers"]
    sent = {"origin": PAGE, "sec-fetch-site": "cross-site"}
    for answer in (guarded.generate("anna", **sent), guarded.post(sent)):
        assert answer.status_code in (200, 401)
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert {"Retry-After", "X-Request-Id"} <= set(answer.headers["access-control-expose-headers"].split(", "))


def test_a_page_that_is_not_allowed_neither_reads_nor_draws(guarded):
    sent = {"origin": "https://evil.example", "sec-fetch-site": "cross-site"}
    refused = guarded.generate("anna", **sent)
    assert (refused.status_code, refused.json()["code"]) == (403, "foreign_origin")
    assert "access-control-allow-origin" not in refused.headers
    assert guarded.generate("anna", **{**sent, "sec-fetch-site": "same-origin"}).status_code == 200


def test_without_keys_everybody_draws(server):
    assert server.generate().status_code == 200
    assert "sdxl_key_requests_total{" not in str(server.metrics())


@given(
    rpm=st.integers(1, 1000),
    waits=st.lists(st.floats(0, 90), max_size=60),
    obeys=st.booleans(),
)
def test_a_bucket_gives_exactly_its_rate_and_its_retry_after_is_true(rpm, waits, obeys):
    bucket, now, taken, wait = Bucket(rpm), 1000.0, [], 0.0
    for pause in waits:
        now += max(pause, wait) if obeys else pause
        promised, wait = wait, bucket.take(now)
        assert not (obeys and promised and wait)
        if not wait:
            taken.append(now)
    for first, begin in enumerate(taken):
        for last in range(first, len(taken)):
            assert last - first + 1 <= rpm + (taken[last] - begin) * rpm / MINUTE + 1e-6


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "app.cli", *arguments]
    return subprocess.run(
        command, env={"PATH": "/usr/bin:/bin", **environment}, capture_output=True, text=True, cwd=ROOT
    )


def test_the_command_makes_a_key_and_keeps_only_its_hash(tmp_path):
    file = tmp_path / "keys.toml"
    made = run("keys", "new", "studio", "--rpm", "60", "--in-flight", "8", API_KEYS_FILE=str(file))
    secret = made.stdout.strip()
    assert (made.returncode, len(secret) > 40, secret in file.read_text()) == (0, True, False), made.stderr
    assert file.stat().st_mode & 0o777 == 0o600
    assert keys.read(file) == (keys.Key(name="studio", sha256=keys.digest(secret), rpm=60, in_flight=8),)
    for name, why in (("studio", "already"), ("no name", "pattern")):
        refused = run("keys", "new", name, API_KEYS_FILE=str(file))
        assert (refused.returncode > 0, why in refused.stderr, refused.stderr.count("\n")) == (True, True, 1)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, "cannot be read"),
        ("[[key]", "no TOML"),
        ('[[key]]\nname = "a"\nsha256 = "short"', "key.0.sha256"),
        ('[[key]]\nname = "a"\nsha256 = "{0}"\nadmin = true', "key.0.admin"),
        ('[[key]]\nname = "a"\nsha256 = "{0}"\n[[key]]\nname = "a"\nsha256 = "{1}"', "same name"),
    ],
)
def test_a_server_does_not_start_with_keys_that_it_cannot_read(tmp_path, text, why):
    file = tmp_path / "keys.toml"
    if text is not None:
        file.write_text(text.format("0" * 64, "1" * 64))
    refused = run("serve", API_KEYS_FILE=str(file))
    assert (refused.returncode, why in refused.stderr, refused.stderr.count("\n")) == (2, True, 1), refused.stderr
