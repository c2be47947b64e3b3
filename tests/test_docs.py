"""The snippets of the documentation run as they are printed, those of a page one after the other."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ("docs/modules.md", "docs/formats.md", "docs/parallel.md")


@pytest.mark.parametrize("page", PAGES)
def test_snippets_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert snippets
    names: dict = {}
    for snippet in snippets:
        exec(compile(snippet, page, "exec"), names)


def test_the_readmes_module_runs():
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (module,) = [snippet for snippet in snippets if "gptjax.nn" in snippet]
    names: dict = {}
    exec(compile(module, "README.md", "exec"), names)
    assert names["y"].shape == (1, 16, 512)
