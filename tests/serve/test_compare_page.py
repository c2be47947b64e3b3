"""The page of a comparison in a real browser, and what its server refuses."""

import threading
import time
from urllib.parse import urlsplit

import httpx
import pytest
import uvicorn

from gptjax.data.chat import conversation
from gptjax.evals.comparison import Comparison, item_of
from gptjax.serve.compare import make_app

HOSTILE = "<script>document.title = 'taken'</script> **bold** <img src=x onerror=alert(1)>"


class Site:
    """A comparison with its page, on a free port, in a thread."""

    def __init__(self, folder, code=""):
        prompts = [conversation([{"role": "user", "content": f"Question *{i}*?"}]) for i in range(3)]
        self.comparison = Comparison(folder, {item_of(prompt): prompt for prompt in prompts}, ["a", "b"])
        for name in "ab":
            for item in self.comparison.prompts:
                self.comparison.add_reply(name, item, f"{name.upper()}-model {HOSTILE}")
        config = uvicorn.Config(make_app(self.comparison, code), port=0, log_level="error", ws="none")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"

    def close(self):
        self.server.should_exit = True
        self.thread.join()


@pytest.fixture
def site(tmp_path):
    site = Site(tmp_path)
    yield site
    site.close()


def test_a_judge_votes_with_the_keyboard_and_may_change_a_vote(site, browser):
    context = browser.new_context()
    page = context.new_page()
    wrong, asked = [], []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: asked.append(request.url))
    page.goto(site.url)
    page.fill("#name", "Ann")
    page.keyboard.press("Enter")
    page.wait_for_selector("#pair:not([hidden])")
    assert page.inner_text("#counted") == "0 of 3"
    assert page.inner_text("#left").startswith(("A-model", "B-model"))
    assert page.locator("#left strong").inner_text() == "bold"
    assert page.locator("#left script, #left img").count() == 0
    page.keyboard.press("ArrowLeft")
    page.wait_for_selector("#counted:text-is('1 of 3')")
    page.keyboard.press("u")
    page.wait_for_selector("[data-choice=left][aria-pressed=true]")
    page.click("[data-choice=right]")
    page.wait_for_selector("[data-choice=right][aria-pressed=false]")
    page.reload()
    page.wait_for_selector("#pair:not([hidden])")
    assert page.inner_text("#counted") == "1 of 3", "a reload loses nothing"
    for count in (2, 3):
        page.click("[data-choice=tie]")
        page.wait_for_selector(f"#counted:text-is('{count} of 3')")
    page.wait_for_selector("#notice:has-text('That was the last one')")
    first, changed, *_ = site.comparison.votes
    assert (first.choice, changed.choice, first.item) == ("left", "right", changed.item)
    assert len(site.comparison.votes) == 4
    assert page.title() == "Which reply is better?"
    assert not wrong
    assert {urlsplit(url).netloc for url in asked} == {urlsplit(site.url).netloc}
    context.close()


@pytest.mark.parametrize("size", [(1280, 800), (390, 844)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everybody_can_use_it(site, browser, size, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed").Axe()
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    page = context.new_page()
    page.goto(site.url)
    page.wait_for_selector("#begin:not([hidden])")
    found = [axe.run(page)]
    page.fill("#name", "Ann")
    page.keyboard.press("Enter")
    page.wait_for_selector("#pair:not([hidden])")
    found.append(axe.run(page))
    assert not [v["id"] for run in found for v in run.response["violations"]]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    context.close()


def test_names_of_models_never_reach_the_judge(site):
    seen = httpx.get(f"{site.url}/next", params={"judge": "ann"}).json()
    assert sorted(seen) == ["choice", "count", "done", "left", "prompt", "right", "unit"]
    assert seen["unit"] not in site.comparison.prompts


def test_what_is_wrong_is_refused(site):
    unit = httpx.get(f"{site.url}/next?judge=ann").json()["unit"]
    good = {"judge": "ann", "unit": unit, "choice": "tie"}
    for change in ({"judge": ""}, {"judge": "model:x"}, {"judge": 3}, {"choice": "A"}, {"unit": "x"}, {"unit": None}):
        assert httpx.post(f"{site.url}/votes", json=good | change).status_code == 400
    for body in (b"", b"[]", b"[" * 4_000, b"\xff"):
        assert httpx.post(f"{site.url}/votes", content=body).status_code == 400
    assert httpx.post(f"{site.url}/votes", content=b" " * 5_000).status_code == 413
    assert httpx.get(f"{site.url}/next?judge=ann", headers={"host": "evil.example"}).status_code == 403
    assert httpx.get(f"{site.url}/assets/compare.py").status_code == 404
    assert httpx.get(f"{site.url}/last?judge=bob").status_code == 404
    assert not site.comparison.votes
    assert httpx.post(f"{site.url}/votes", json=good).status_code == 200


def test_a_public_page_needs_its_code(tmp_path):
    site = Site(tmp_path, code="secret")
    try:
        for headers in ({}, {"authorization": "Bearer wrong"}):
            assert httpx.get(f"{site.url}/next?judge=ann", headers=headers).status_code == 401
        answer = httpx.get(
            f"{site.url}/next?judge=ann", headers={"authorization": "Bearer secret", "host": "x.example"}
        )
        assert answer.status_code == 200
    finally:
        site.close()
