"""The documentation is true: its snippets run as they are printed, and its links lead somewhere."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/**/*.md"))
OTHERS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md"]


def blocks(page: str) -> list[tuple[str, str, str]]:
    """(language, title, text) of the fenced blocks that say what they are."""
    fence = re.compile(r"^```(\w+)(?: title=\"([^\"]*)\")?\n(.*?)^```", re.DOTALL | re.MULTILINE)
    return fence.findall((ROOT / page).read_text())


def environment() -> dict[str, str]:
    """For commands: this Python's programs, this checkout, and one device."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    programs, packages = f"{Path(sys.executable).parent}:{os.environ['PATH']}", os.environ.get("PYTHONPATH", "")
    return os.environ | {"PATH": programs, "PYTHONPATH": f"{ROOT}:{packages}", "XLA_FLAGS": flags}


NEEDS = {"ReasoningGym": "reasoning_gym"}
"""Word of a block -> module that it needs and `dev` does not install; CI does."""


@pytest.mark.slow  # they train, plan and start processes
@pytest.mark.parametrize("page", [page for page in [*PAGES, "CONTRIBUTING.md"] if blocks(page)])
def test_blocks_run(page, tmp_path, monkeypatch):
    """One after the other, in a folder with nothing but the checkout's `tests` and `tpu`: a block with a title is a
    file, others are run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for folder in ("tests", "tpu"):
        Path(folder).symlink_to(ROOT / folder)
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "cache"))
    names: dict = {}
    for language, title, text in blocks(page):
        if title:
            Path(title).write_text(text)
        elif any(word in text and importlib.util.find_spec(module) is None for word, module in NEEDS.items()):
            continue
        elif language == "python":
            exec(compile(text, page, "exec"), names)
        elif language == "bash":
            done = subprocess.run(["bash", "-ec", text], env=environment(), capture_output=True, text=True)
            assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"


def test_the_readmes_module_runs():
    (module,) = [text for language, _, text in blocks("README.md") if language == "python" and "gptjax.nn" in text]
    names: dict = {}
    exec(compile(module, "README.md", "exec"), names)
    assert names["y"].shape == (1, 16, 512)


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "benchmarks/README.md"])
def test_pages_begin_with_whom_they_are_for_and_something_to_run(page):
    title, _, first, *lines = (ROOT / page).read_text().splitlines()
    assert title.startswith("# ")
    assert first.startswith("For "), f"{page} begins: {first}"
    assert any(line.startswith("```") for line in lines[:7]), f"{page}: nothing to run within the first ten lines"


@pytest.mark.parametrize("page", PAGES + OTHERS)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", (ROOT / page).read_text()):
        if ":" in target:
            continue
        file = (ROOT / page).parent / target if target else ROOT / page
        assert file.exists(), f"{page} links to {target}"
        if anchor and file.suffix == ".md":
            titles = re.findall(r"^#+ (.*)", file.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}
            assert anchor in slugs, f"{page} links to {target}#{anchor}"
