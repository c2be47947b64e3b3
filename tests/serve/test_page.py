"""The page in a real browser: Chromium, without a window."""

import json
import threading

import pytest
from scripted import ScriptedServer

SAID = "Some **bold** text, $x^2$ and `code`.\n\n```python\nx = [1]\n```\n\n- one\n- two\n"
HOSTILE = """<script>alert(1)</script><img src=x onerror=alert(1)> ![p](https://evil.example/p.png)

[run](javascript:alert(1)) <style>*{display:none}</style> <iframe src="https://evil.example"></iframe>

$\\text{<img src=x onerror=alert(1)>}$

```html
<script>alert(1)</script>
```
"""


def script(prompt: str) -> str:
    """The reply to a conversation: by its last word."""
    if prompt.endswith("think"):
        return "<think>\nLet me see\n</think>\n\n**Seen**\n"
    return HOSTILE if prompt.endswith("attack") else "word " * 60 if prompt.endswith("long") else SAID


@pytest.fixture(scope="module")
def server():
    server = ScriptedServer(script)
    yield server
    server.close()


class Tab:
    """A tab of the page, in a browser profile of its own or another tab's; it notes what goes wrong."""

    def __init__(self, browser, server, context=None, **options):
        self.server = server
        self.context = context or browser.new_context(**options)
        self.context.set_default_timeout(10_000)
        self.page = self.context.new_page()
        self.wrong, self.asked = [], []
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("console", lambda message: self.wrong.append(message.text) if message.type == "error" else None)
        self.page.on("request", lambda request: self.asked.append(request.url))

    def open(self, url: str | None = None):
        self.page.goto(url or self.server.url)
        self.page.wait_for_selector("#model option", state="attached")
        return self

    def send(self, text: str, wait: bool = True):
        self.page.fill("#text", text)
        self.page.keyboard.press("Enter")
        self.page.wait_for_selector("article.assistant")
        if wait:
            self.done()
        return self

    def done(self):
        self.page.wait_for_selector("#send[title=Send]")

    def press(self, name: str, article: str = "article:last-child"):
        self.page.locator(f"{article} [aria-label='{name}']").click()

    @property
    def replies(self) -> list[str]:
        return self.page.locator("article.assistant .body").all_inner_texts()


@pytest.fixture
def tab(browser, server):
    tab = Tab(browser, server)
    yield tab.open()
    server.engine.go.set()
    server.engine.pause = 0.0
    tab.context.close()
    assert not tab.wrong


def test_a_reply_streams_and_is_rendered(tab, server):
    page = tab.page
    tab.send("Hi")
    for found in ("strong", ".math math", "code", ".code pre .n", "li"):
        assert page.locator(f"article.assistant {found}").count(), found
    assert page.locator(".facts").last.inner_text().startswith(f"{len(SAID.encode())} tokens · ")
    assert page.title() == "Hi · gptjax"
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.click(".code-bar button")
    assert page.evaluate("navigator.clipboard.readText()").strip() == "x = [1]"
    tab.send("And again")
    assert "Hi" in server.engine.prompts[-1], "the conversation goes along"
    assert SAID in server.engine.prompts[-1]
    assert page.locator("#list a").all_inner_texts() == ["Hi"]


def test_enter_sends_but_not_while_a_word_is_composed(tab, server):
    page, before = tab.page, len(server.engine.prompts)
    page.fill("#text", "你好")
    for how in ({"isComposing": True}, {"keyCode": 229}):
        page.dispatch_event("#text", "keydown", {"key": "Enter", **how})
    page.keyboard.press("Shift+Enter")
    assert page.input_value("#text") == "你好\n"
    assert len(server.engine.prompts) == before
    page.keyboard.press("Enter")
    tab.done()
    page.wait_for_selector("article.assistant strong")
    assert len(server.engine.prompts) == before + 1
    assert page.input_value("#text") == ""


def test_stop_ends_the_reply_where_it_is(tab, server):
    server.engine.pause = 0.02
    tab.send("long", wait=False)
    tab.page.wait_for_selector(".open:has-text('word word')")
    tab.page.keyboard.press("Escape")
    tab.done()
    assert tab.page.locator(".facts").inner_text().endswith("· stopped")
    assert len("word word") <= len(tab.replies[0]) < 299


def test_a_reply_survives_reload_and_is_in_every_tab(tab, server, browser):
    page, gate = tab.page, server.engine.go
    server.engine.pause = 0.005
    tab.send("long", wait=False)
    page.wait_for_selector(".open:has-text('word word')")
    gate.clear()
    page.reload()
    page.wait_for_selector("#send[title=Stop]")
    page.wait_for_selector(".open:has-text('word word')")
    second = Tab(browser, server, tab.context).open(page.url)
    second.page.wait_for_selector(".open:has-text('word word')")
    gate.set()
    for one in (tab, second):
        one.done()
        assert one.replies == [("word " * 60).strip()]
    server.engine.pause = 0.02
    second.send("long", wait=False)
    page.wait_for_selector("article:nth-child(4) .open:has-text('word')")
    server.engine.pause = 0.0
    for one in (tab, second):
        one.done()
        assert one.replies == [("word " * 60).strip()] * 2, "and what one sends, the other shows as it comes"
    assert not second.wrong


def test_the_server_may_go_and_come_back(browser):
    """The page says so, stays readable, also when it is reloaded, and goes on by itself."""
    server = ScriptedServer(script)
    tab = Tab(browser, server).open().send("Hi")
    page = tab.page
    try:
        page.evaluate("navigator.serviceWorker.ready.then(() => true)")
        server.engine.pause = 0.05
        tab.send("long", wait=False)
        page.wait_for_selector(".open:has-text('word')")
        threading.Thread(target=server.engine.close).start()
        server.close()
        page.wait_for_selector("#warning:not([hidden])")
        page.reload()
        page.wait_for_selector("#warning:not([hidden])")
        assert len(tab.replies) == 2
        assert "bold" in tab.replies[0]
        server.engine.pause = 0.0
        server.start()
        page.wait_for_selector("#warning", state="hidden")
        page.wait_for_selector("article.assistant strong")
        tab.done()
        assert "interrupted" in page.locator(".facts").last.inner_text()
        tab.send("Hi again")
        assert len(tab.replies) == 3
    finally:
        tab.context.close()
        server.close()


def test_a_lost_connection_is_taken_up_again(tab, server):
    gate = server.engine.go
    server.engine.pause = 0.005
    tab.send("long", wait=False)
    tab.page.wait_for_selector(".open:has-text('word word')")
    gate.clear()
    server.cut()
    tab.page.wait_for_timeout(100)
    gate.set()
    tab.done()
    assert tab.replies == [("word " * 60).strip()]
    kept = tab.page.evaluate("Object.values(localStorage).join()")
    assert f'"text":{json.dumps("word " * 60)}' in kept, "each event is read once"
    tab.wrong.clear()  # the browser's own words about the network


def test_a_hostile_reply_does_nothing(tab):
    page = tab.page
    page.on("dialog", lambda dialog: tab.wrong.append(dialog.message) or dialog.dismiss())
    tab.send("attack")
    page.reload()  # also as it is rendered again
    page.wait_for_selector("article.assistant .code")
    for element in ("script", "img", "style", "iframe", "[onerror]", "[style]", "a:not([href^='https://'])"):
        assert page.locator(f"#messages {element}").count() == 0, element
    assert page.locator("#messages a[rel~=noopener]").inner_text() == "p"
    assert all(url.startswith(tab.server.url) for url in tab.asked)
    assert "<script>alert(1)</script>" in page.locator("article.assistant .code pre").inner_text()


def test_edits_and_other_replies_are_branches(tab, server):
    page = tab.page
    page.on("dialog", lambda dialog: dialog.accept())
    tab.send("Hi")
    tab.press("Edit", "article.user")
    page.fill(".editor textarea", "long")
    page.click(".editor .main")
    tab.page.wait_for_selector("article.assistant:has-text('word word')")
    tab.done()
    assert page.locator("article.user .count").inner_text() == "2/2"
    tab.press("Previous version", "article.user")
    assert page.locator("article.assistant strong").count() == 1
    tab.press("Reply again")
    tab.done()
    assert page.locator("article.assistant .count").inner_text() == "2/2"
    tab.press("Compare versions")
    assert page.locator(".compare section").count() == 2
    page.locator(".compare section").first.get_by_text("Keep this one").click()
    assert page.locator("article.assistant .count").inner_text() == "1/2"
    tab.press("Edit")
    page.fill(".editor textarea", "My own words, and")
    page.click(".editor .main")
    assert page.locator("article.assistant .count").inner_text() == "3/3"
    tab.press("Continue")
    page.wait_for_selector("article.assistant strong")
    tab.done()
    assert server.engine.prompts[-1].endswith("My own words, and")
    assert tab.replies[0].startswith("My own words, andSome bold text")
    tab.press("Delete from here")
    assert page.locator("article.assistant .count").inner_text() == "2/2"


def test_reasoning_can_be_unfolded(tab, server):
    tab.send("think")
    tab.page.wait_for_selector("article.assistant strong")
    assert tab.replies[0].split() == ["Thinking", "Seen"]
    tab.page.reload()
    tab.page.wait_for_selector("article.assistant strong")
    tab.page.click(".thought summary")
    assert tab.page.locator(".thought .plain").inner_text() == "Let me see"


def test_settings_go_with_the_request(tab, server):
    page = tab.page
    page.click("#open-settings")
    page.fill("#system", "Be brief.")
    page.fill("[name=temperature]", "0.25")
    page.fill("[name=seed]", "7")
    page.fill("[name=max_tokens]", "9")
    page.select_option("#theme", "dark")
    page.click("dialog .main")
    page.select_option("#model", "other")
    tab.send("Hi")
    request = server.engine.requests[-1]
    assert (request.sampling.temperature, request.seed, request.max_tokens) == (0.25, 7, 9)
    assert "Be brief." in server.engine.prompts[-1]
    assert page.get_attribute("article.assistant", "aria-label") == "other"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(27, 26, 25)"


def test_probabilities_of_tokens(tab):
    page = tab.page
    tab.send("Hi")
    tab.press("Probabilities")
    page.wait_for_selector(".tokens > span")
    assert page.locator(".tokens > span").count() == len(SAID.encode())
    page.hover(".tokens > span:nth-child(2)")
    assert page.locator(".card .chosen").inner_text().split("\n") == ["o", "95.1 %"]
    page.focus(".tokens")
    page.keyboard.press("ArrowRight")
    assert page.locator(".card .chosen").inner_text().split("\n")[0] == "m"
    tab.press("Probabilities")
    assert page.locator("article.assistant strong").count() == 1


def test_conversations_are_searched_exported_deleted_and_imported(tab, tmp_path):
    page = tab.page
    page.on("dialog", lambda dialog: dialog.accept("Renamed" if dialog.type == "prompt" else None))
    tab.send("First about whales")
    page.click("#fresh")
    tab.send("Second")
    page.click("[popovertarget=actions]")
    page.click("#rename")
    assert page.locator("#list a").all_inner_texts() == ["Renamed", "First about whales"]
    page.fill("#search", "WHALES first")
    assert page.locator("#list a").all_inner_texts() == ["First about whales"]
    page.fill("#search", "")
    with page.expect_download() as download:
        page.click("#export-all")
    file = tmp_path / "all.json"
    download.value.save_as(file)
    assert json.loads(file.read_text())["conversations"][0]["title"] == "Renamed"
    for _ in range(2):
        page.locator("#list a").first.click()
        page.click("[popovertarget=actions]")
        page.click("#delete")
    assert page.locator("#list a").count() == 0
    page.set_input_files("#file", file)
    page.wait_for_selector("article.assistant strong")
    assert page.locator("#list a").count() == 2
    page.reload()
    assert page.locator(".facts").last.inner_text().startswith(f"{len(SAID.encode())} tokens")
    wrong = json.loads(file.read_text())
    wrong["conversations"][0]["messages"] = {"x": {"id": "x", "parent": "x", "role": "user", "text": "", "created": 1}}
    file.write_text(json.dumps(wrong))
    with page.expect_event("dialog") as dialog:
        page.set_input_files("#file", file)
    assert "Not imported: messages in a circle" in dialog.value.message


def test_a_full_storage_loses_no_text(tab):
    page = tab.page
    page.evaluate("for (let n = 1 << 22; n; n >>= 1) try { localStorage['x' + n] = 'x'.repeat(n) } catch {}")
    page.fill("#text", "My words")
    page.keyboard.press("Enter")
    page.wait_for_selector("#warning:has-text('storage is full')")
    assert page.input_value("#text") == "My words"


def test_a_wrong_key_is_asked_for(browser):
    server = ScriptedServer(script, keys=("secret",))
    tab = Tab(browser, server)
    try:
        tab.page.goto(server.url)
        tab.page.fill("dialog #key", "secret")
        tab.page.click("dialog .main")
        tab.page.wait_for_selector("#model option", state="attached")
        assert tab.send("Hi").replies
    finally:
        tab.context.close()
        server.close()


@pytest.mark.parametrize("scheme", ["light", "dark", "phone"])
def test_it_is_accessible(browser, server, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed").Axe()
    phone = {"viewport": {"width": 360, "height": 700}, "has_touch": True, "is_mobile": True}
    tab = Tab(browser, server, **(phone if scheme == "phone" else {"color_scheme": scheme}))
    page = tab.open().page

    def check():
        found = axe.run(page)
        assert found.violations_count == 0, found.generate_report()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is wider than the screen"

    check()
    page.fill("#text", "Hi")
    page.keyboard.press("Enter")
    if scheme == "phone":
        assert page.input_value("#text") == "Hi\n", "Enter is a new line on a phone"
        page.click("#send")
    page.wait_for_selector("article.assistant .foot .icon")
    check()
    tab.press("Reply again")
    tab.done()
    tab.press("Compare versions")
    check()
    page.get_by_text("Keep this one").first.click()
    tab.press("Probabilities")
    page.wait_for_selector(".tokens > span")
    tab.press("Edit", "article.user")
    check()
    if scheme == "phone":
        page.click("#open-side")
        page.wait_for_timeout(250)
        check()
        page.locator("#list a").first.click()
        assert page.get_attribute("#open-side", "aria-expanded") == "false"
    page.click("#open-settings")
    check()
    assert not tab.wrong
    tab.context.close()
