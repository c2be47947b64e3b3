"""The documentation is true: its snippets run as they are printed, and its links lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/**/*.md"))
OTHERS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md"]


def snippets(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)])
def test_snippets_run(page, tmp_path, monkeypatch):
    """Those of a page one after the other, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for snippet in snippets(page):
        exec(compile(snippet, page, "exec"), names)


def test_the_readmes_module_runs():
    (module,) = [snippet for snippet in snippets("README.md") if "gptjax.nn" in snippet]
    names: dict = {}
    exec(compile(module, "README.md", "exec"), names)
    assert names["y"].shape == (1, 16, 512)


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
