"""`gptjax chat` in a terminal, and with a server."""

import io
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from gptjax.cli import main
from gptjax.cli.chat import show_markdown
from gptjax.cli.chat_models import LocalModel
from gptjax.data.chat import Message
from gptjax.models.language_model import LanguageModel

sys.path.append(str(Path(__file__).parents[1] / "serve"))
from scripted import ScriptedServer


def script(prompt: str) -> str:
    if prompt.endswith("think"):
        return "<think>\nHm.\n</think>\n\nSo."
    return "**Bold** words.\n\n- one\n" if prompt.endswith("list") else f"You said {prompt[-5:]}"


@pytest.fixture(scope="module")
def server():
    server = ScriptedServer(script, keys=("secret",), context=400)
    yield server
    server.close()


@pytest.fixture
def run(monkeypatch, capsys, server):
    """Chats with the server, with this standard input -> (exit code, standard output, standard error)."""

    def run(stdin: str, *arguments: str, url: str = server.url, key: str = "secret") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        monkeypatch.setenv("GPTJAX_API_KEY", key)
        try:
            code = main.main(["chat", "--url", url, *arguments])
        except SystemExit as stop:
            code = stop.code
        return (code, *capsys.readouterr())

    return run


def test_a_servers_models_answer(run, server):
    lines = ["hello", "/model", "/model other", "/model none", "/retry", "again"]
    code, out, err = run(
        "\n".join(lines), "--system", "be", "--temperature", "0.5", "--max-tokens", "40", "--seed", "1"
    )
    assert (code, out.splitlines()) == (0, ["You said hello", "You said hello", "You said again"])
    assert "(tiny, which answers now)\n(other)\n(other, which answers now)" in err
    assert "(model: got none, must be one of tiny, other)" in err
    first, other, last = server.engine.requests[-3:]
    assert (first.sampling.temperature, first.max_tokens) == (0.5, 40)
    assert first.prompt == other.prompt
    assert first.seed != other.seed
    assert server.engine.prompts[-1] == "behelloYou said helloagain"
    assert run("hi", url=f"{server.url}/v1/", key="secret")[1] == "You said hi\n".replace(
        "hi", server.engine.prompts[-1][-5:]
    )
    assert last.stop == ()


def test_the_older_half_is_left_out_when_it_is_too_long(run, server):
    code, out, err = run("\n".join(["x" * 60] * 4 + ["y" * 500, "still"]), "--max-tokens", "100")
    assert (code, len(out.splitlines())) == (0, 5)
    assert "messages no longer fit the model's context and are left out)" in err
    assert "(messages: got " in err or "(max_tokens: got " in err
    assert out.endswith("You said still\n")


def test_reasoning_is_announced_and_not_part_of_the_answer(run, server, monkeypatch, capsys):
    assert run("think") == (0, "So.\n", "(thinking)\n")
    monkeypatch.setattr(LanguageModel, "engine", lambda *_, **__: server.engine)
    local = LocalModel(Path("some"), lambda path: server.models["tiny"].model)
    options = {"max_tokens": None, "seed": 0, "stop": (), "template": {}}
    left_out, pieces = local.reply([Message("user", "think")], options)
    assert (left_out, "".join(pieces)) == (0, "So.")
    assert capsys.readouterr().err == "(thinking)\n"


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ([], {"url": "http://127.0.0.1:9"}, "error: --url: got http://127.0.0.1:9/v1, which does not answer"),
        ([], {"url": "ftp://x"}, "error: --url: got 'ftp://x', must begin with http"),
        ([], {"key": "wrong"}, "error: the API key is missing or wrong"),
        (["--model", "huge"], {}, "error: --model: got huge, must be one of tiny, other"),
        (["/some/path"], {}, "and the path /some/path, must be one of them"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_wrong_with_a_server_is_told(run, arguments, options, message):
    code, out, err = run("hi", *arguments, **options)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_markdown_is_shown_block_by_block_and_commands_nothing():
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=40, height=10, color_system="standard")

    def pieces():
        yield "# Title\n\nSome **bo"
        assert "Title" in screen.getvalue()
        yield "ld** words.\n\n```python\nx = 1\n```\n\x1b]0;hacked\x07"
        raise KeyboardInterrupt

    text = show_markdown(pieces(), console)
    assert text.endswith("\x1b]0;hacked\x07"), "the text itself is as it was written"
    shown = screen.getvalue()
    assert "\x1b]0;" not in shown
    assert "\x07" not in shown
    assert "x = 1" in re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert "\x1b[1mbold\x1b[0m" in shown


def test_a_terminal_shows_markdown_and_ctrl_c_stops_an_answer_only(server):
    command = [sys.executable, "-m", "gptjax.cli.main", "chat", "--url", server.url, "--key", "secret"]
    leader, follower = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "60", "LINES": "20"}
    chat = subprocess.Popen(
        command, stdin=follower, stdout=follower, stderr=follower, env=environment, start_new_session=True
    )
    os.close(follower)
    seen = ""

    def wait(words: str) -> None:
        nonlocal seen
        deadline = time.monotonic() + 60
        while words not in seen:
            assert time.monotonic() < deadline, seen
            if select.select([leader], [], [], 1)[0]:
                seen += os.read(leader, 10_000).decode()

    try:
        wait("> ")
        os.write(leader, b"make a list\n")
        wait(" \u2022 ")
        assert "\x1b[1mBold\x1b[0m words." in seen
        wait("> ")
        server.engine.go.clear()
        os.write(leader, b"hello\n")
        time.sleep(0.5)
        os.kill(chat.pid, 2)
        wait("no answer; the message is not part")
        server.engine.go.set()
        os.write(leader, b"/quit\n")
        assert chat.wait(20) == 0
    finally:
        server.engine.go.set()
        chat.kill()
        os.close(leader)
