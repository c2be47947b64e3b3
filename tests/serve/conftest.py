"""A server of the tiny model, OpenAI's client of it, for a file of tests that needs no other, and a browser."""

import shutil
from pathlib import Path

import openai
import pytest


@pytest.fixture(scope="module")
def server():
    from test_serve import Server

    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        own = playwright.chromium.executable_path  # if `playwright install chromium` was run
        programs = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
        program = next((path for path in (*programs, own) if path and Path(path).exists()), None)
        if program is None:
            pytest.skip("there is no chromium on this machine")
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()
