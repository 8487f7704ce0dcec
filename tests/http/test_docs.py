"""/docs in a real browser, with no network but the server's own port."""

from tests.conftest import browser_page


async def test_the_docs_page_works_offline_and_sends_a_request(server):
    async with browser_page() as page:
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        await page.goto(f"{server.url}/docs")
        await page.get_by_text("/generate").first.click()
        await page.get_by_role("button", name="Try it out").click()
        await page.get_by_role("button", name="Execute").click()
        await page.get_by_text("b64_json").first.wait_for()
    assert all(url.startswith((server.url, "data:", "blob:")) for url in asked)
