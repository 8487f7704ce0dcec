"""The playground in a real browser."""

import asyncio
import base64
import io
import re
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import httpx
import pytest
from PIL import Image
from playwright.async_api import Page

from tests.conftest import TOOLS, browser_page, eventually, needed

AXE = TOOLS / "node_modules" / "axe-core" / "axe.min.js"
DRAWN = "#pictures figure:not(.waits) img"
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True}
APPLE = "a red apple on a blue background"
READABLE = {"bypass_csp": True}  # else not even the browser's own tools may fetch a picture out of the page
BYTES = "async (image) => [...new Uint8Array(await (await fetch(image.src)).arrayBuffer())]"


@asynccontextmanager
async def opened(url: str, **options: object) -> AsyncIterator[Page]:
    """The page in a browser of its own, ready to be typed into. No error may reach its console."""
    async with browser_page(**options) as page:
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda told: errors.append(told.text) if "Security Policy" in told.text else None)
        await page.goto(url)
        await page.locator("#server", has_text="embedded").wait_for()
        yield page
        assert errors == []


async def is_a_red_apple_on_blue(page: Page, number: int) -> bool:
    """Whether a picture is blue at its corner and red in its middle."""
    image = page.locator(DRAWN).nth(number)
    await image.wait_for()
    pixels = Image.open(io.BytesIO(bytes(await image.evaluate(BYTES)))).convert("RGB")
    (red, _, blue), (edge_red, _, edge_blue) = pixels.getpixel((64, 80)), pixels.getpixel((4, 4))
    return red > blue + 60 and edge_blue > edge_red + 60


async def test_what_is_typed_is_drawn_in_all_step_counts_and_a_reload_restores_it(server):
    async with opened(server.url, **READABLE) as page:
        await page.locator("#prompt").press_sequentially(APPLE, delay=5)
        for number in range(4):
            assert await is_a_red_apple_on_blue(page, number)
        assert await page.locator("figcaption").all_inner_texts() != []
        seed = await page.locator("#seed").input_value()
        await page.reload()
        await page.locator("#gallery img").nth(3).wait_for()
        assert await page.locator("#prompt").input_value() == APPLE
        assert await page.locator("#seed").input_value() == seed
        assert await is_a_red_apple_on_blue(page, 0)


async def test_a_link_reproduces_the_picture_byte_for_byte(server):
    link = '#{"prompt":"a red apple on a blue background","steps":"4","seed":"7","count":"1"}'
    async with opened(f"{server.url}/{link}", **READABLE) as page:
        image = page.locator(DRAWN)
        await image.wait_for()
        shown = bytes(await image.evaluate(BYTES))
    (drawn,) = server.generate(prompt=APPLE, seed=7).json()["images"]
    assert shown == base64.b64decode(drawn["b64_json"])


async def test_a_picture_is_opened_by_keyboard_and_told_as_a_command(server):
    async with opened(server.url) as page:
        await page.locator("#prompt").fill(APPLE)
        await page.locator(DRAWN).nth(3).wait_for()
        await page.locator("figure button").first.focus()
        await page.keyboard.press("Enter")
        await page.locator("#viewer-facts").wait_for()
        await page.get_by_role("button", name="Copy as curl").click()
        told = page.locator("#copied").filter(has_text=re.compile(rf"clipboard|curl -s {server.url}/generate"))
        await told.wait_for()
        await page.keyboard.press("Escape")
        assert not await page.locator("#viewer").is_visible()


async def test_a_picture_is_shown_while_it_is_drawn(server):
    async with opened(server.url, **READABLE) as page:
        await page.evaluate("""() => {
            window.shown = new Set();
            const look = (changes) => changes.forEach(({ target }) => {
                if (target.matches("figure.preview")) window.shown.add([...target.parentNode.children].indexOf(target));
            });
            new MutationObserver(look).observe(document.body, { attributes: true, subtree: true });
        }""")
        await page.locator("#prompt").fill(APPLE)
        assert await is_a_red_apple_on_blue(page, 3)
        assert await page.evaluate("[...window.shown].sort()") == [1, 2, 3]  # one step has no preview


async def test_who_stands_in_the_queue_sees_how_many_are_ahead(server):
    async with opened(server.url) as page:
        await page.get_by_text("4", exact=True).locator("visible=true").first.click()
        with ThreadPoolExecutor(1) as pool:
            with server.stopped_engine():
                others = pool.submit(server.generate, n=3)
                assert await asyncio.to_thread(eventually, lambda: server.in_engine() == 3)
                await page.locator("#prompt").fill(APPLE)
                await page.get_by_text("3 ahead, about").wait_for()
            await page.locator(DRAWN).wait_for()
            assert others.result().status_code == 200


async def test_a_refusal_is_a_sentence_with_a_countdown_and_is_tried_again(server):
    async with opened(server.url, **READABLE) as page:
        busy = {"status": 429, "detail": "too busy; ask again in 2 s", "code": "overloaded"}
        answers = iter([True])

        async def refuse_at_first(route):
            if next(answers, False):
                await route.fulfill(status=429, headers={"Retry-After": "2"}, json=busy)
            else:
                await route.continue_()

        await page.route("**/generate", refuse_at_first)
        await page.locator("#prompt").fill(APPLE)
        await page.get_by_role("alert").filter(has_text="Trying again in").wait_for()
        assert await is_a_red_apple_on_blue(page, 3)
        assert not await page.get_by_role("alert").is_visible()


async def test_a_server_that_wants_a_key_is_given_the_one_typed(server):
    async with opened(server.url, **READABLE) as page:
        sent = []

        async def wants_a_key(route):
            sent.append(route.request.headers.get("authorization"))
            if sent[-1] is None:
                await route.fulfill(status=401, json={"status": 401, "detail": "a key is needed"})
            else:
                await route.continue_()

        await page.route("**/generate", wants_a_key)
        await page.locator("#prompt").fill(APPLE)
        await page.locator("#key").fill("secret")
        await page.get_by_role("button", name="Use it").click()
        assert await is_a_red_apple_on_blue(page, 3)
        assert sent[-1] == "Bearer secret"


@pytest.mark.parametrize("options", [{}, {"color_scheme": "dark"}, PHONE], ids=["light", "dark", "phone"])
async def test_axe_finds_nothing_serious(server, options):
    needed(str(AXE), "none; make .venv/tooled")
    async with opened(server.url, **READABLE, **options) as page:
        await page.locator("#prompt").fill(APPLE)
        await page.locator(DRAWN).nth(3).wait_for()
        await page.add_script_tag(path=AXE)
        found = await page.evaluate("async () => (await axe.run()).violations")
    serious = [(each["id"], each["nodes"][0]["html"]) for each in found if each["impact"] in ("serious", "critical")]
    assert serious == []


def test_files_are_the_ones_listed_with_an_etag_and_a_strict_policy(server):
    with httpx.Client(base_url=server.url) as client:
        page = client.get("/")
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert "unsafe" not in page.headers["content-security-policy"]
        again = client.get("/web/main.js", headers={"if-none-match": client.get("/web/main.js").headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        for name in ("../main.py", "..%2fmain.py", "index.html", "nothing.js", "main.js%00"):
            assert client.get(f"/web/{name}").status_code == 404
