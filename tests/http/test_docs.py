"""/docs in a real browser, with no network but the server's own port."""

from playwright.async_api import async_playwright

from tests.conftest import needed


async def test_the_docs_page_works_offline_and_sends_a_request(server):
    chromium = needed("chromium", "chromium")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        page = await browser.new_page()
        page.set_default_timeout(120_000)  # milliseconds: a browser needs both cores of a shared machine
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        await page.goto(f"{server.url}/docs")
        await page.get_by_text("/generate").first.click()
        await page.get_by_role("button", name="Try it out").click()
        await page.get_by_role("button", name="Execute").click()
        await page.get_by_text("b64_json").first.wait_for()
        await browser.close()
    assert all(url.startswith((server.url, "data:", "blob:")) for url in asked)
