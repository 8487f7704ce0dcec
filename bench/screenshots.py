"""python -m bench.screenshots: docs/playground/*.jpg, the playground as it looks, of a server that this starts."""

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from playwright.async_api import Page

from tests.conftest import ROOT, ServerProcess, browser_page

FOLDER = ROOT / "docs" / "playground"
DESK: dict[str, Any] = {"viewport": {"width": 1280, "height": 860}}
PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
FOX = {"prompt": "a fox on a teal background", "steps": "all", "seed": "7", "count": "1"}
BUSY = {"status": 429, "detail": "the queue is too long to meet the deadline; ask again in 9 s", "code": "overloaded"}
DRAWN = "#pictures figure:not(.waits) img"


def main() -> None:
    """Take all of them."""
    FOLDER.mkdir(exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        ServerProcess(Path(folder) / "log", THREADS="2", COMPILE="1") as server,
    ):
        for _ in range(5):  # so that the times in the pictures are usual ones
            assert all(server.generate(steps=steps).status_code == 200 for steps in (1, 2, 4, 8))
        asyncio.run(_shots(server.url))


async def _shots(url: str) -> None:
    for name, options in (("start", DESK), ("dark", {**DESK, "color_scheme": "dark"}), ("phone", PHONE)):
        async with _opened(url, options) as page:
            if name != "start":
                await _draw(page, url, FOX, 4)
            await _shoot(page, name)
    async with _opened(url, DESK) as page:
        await _draw(page, url, FOX, 4)
        await _shoot(page, "steps")
    async with _opened(url, DESK) as page:
        refusal = {"status": 429, "headers": {"Retry-After": "9"}, "json": BUSY}
        await page.route("**/generate", lambda route: route.fulfill(**refusal))
        await page.goto(f"{url}/#{json.dumps(FOX)}")
        await page.reload()
        await page.get_by_role("alert").wait_for()
        await _shoot(page, "busy")
    async with _opened(url, DESK) as page:
        await page.goto(f"{url}/#{json.dumps({**FOX, 'steps': '8', 'count': '8'})}")
        await page.reload()
        await page.locator("figure.preview").first.wait_for()
        await _shoot(page, "drawing")


@asynccontextmanager
async def _opened(url: str, options: dict[str, Any]) -> AsyncIterator[Page]:
    async with browser_page(**options) as page:
        await page.goto(url)
        await page.locator("#server", has_text="cpu").wait_for()
        yield page


async def _shoot(page: Page, name: str) -> None:
    await page.screenshot(path=FOLDER / f"{name}.jpg", type="jpeg", quality=85)


async def _draw(page: Page, url: str, settings: dict[str, str], pictures: int) -> None:
    await page.goto(f"{url}/#{json.dumps(settings)}")
    await page.reload()
    await page.locator(DRAWN).nth(pictures - 1).wait_for()


if __name__ == "__main__":
    main()
