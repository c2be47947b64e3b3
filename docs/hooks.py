"""Hooks of the documentation site, named in `mkdocs.yml`: pages made from the source, and docstrings as Markdown.

Every module of `gptjax` gets a page under "Reference" and every file of `experiments/` one under "Experiments", so that
nothing has to be listed by hand. `Docstrings` is an extension of griffe, which reads the docstrings for mkdocstrings.
"""

from __future__ import annotations

import ast
import posixpath
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "benchmarks/README.md": "benchmarks.md"}
"""Pages that are kept elsewhere in the repository -> their place on the site."""
EXPERIMENTS = {
    f"experiments/{path.name}": f"experiments/{path.stem}.md"
    for path in sorted(ROOT.glob("experiments/*.py"))
    if not path.stem.startswith("_")
}
MODULES = {
    path.relative_to(ROOT).as_posix(): "reference/"
    + path.relative_to(ROOT / "gptjax").as_posix().replace("__init__.py", "index.md").replace(".py", ".md")
    for path in sorted(ROOT.glob("gptjax/**/*.py"))
}
SITE = PAGES | EXPERIMENTS | MODULES
SOURCE = {page: source for source, page in SITE.items()}


def on_config(config: Any) -> Any:
    """Complete the navigation with the pages that are made here."""
    config.nav += [
        {"Experiments": list(EXPERIMENTS.values())},
        {"Reference": _navigation("reference")},
        {"Project": list(PAGES.values())},
    ]
    return config


def _navigation(folder: str) -> list[Any]:
    """The pages of a folder, its index first, then its modules and folders by name."""
    here = [page for page in MODULES.values() if PurePosixPath(page).is_relative_to(folder)]
    names = {PurePosixPath(page).relative_to(folder).parts[0] for page in here}
    found: list[Any] = [f"{folder}/index.md"]
    for name in sorted(names - {"index.md"}):
        inside = f"{folder}/{name}"
        if name.endswith(".md"):
            found.append({name.removesuffix(".md"): inside})
        else:
            pages = _navigation(inside)
            found.append({name: pages if len(pages) > 1 else pages[0]})
    return found


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made from other files of the repository."""
    package = griffe.load("gptjax", search_paths=[str(ROOT)])
    for source, page in SITE.items():
        text = (ROOT / source).read_text()
        if source in EXPERIMENTS:
            text = _experiment(source, text)
        elif source in MODULES:
            text = _module(source, package)
        files.append(File.generated(config, page, content=text))
    return files


def _experiment(source: str, text: str) -> str:
    tree = ast.parse(text)
    docstring = ast.get_docstring(tree) or ""
    body = "\n".join(text.splitlines()[tree.body[0].end_lineno :]).strip()
    return f'# {Path(source).stem}\n\n{to_markdown(docstring)}\n\n```python title="{source}"\n{body}\n```\n'


def _module(source: str, package: Any) -> str:
    name = source.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    module = package if name == "gptjax" else package[name.removeprefix("gptjax.")]
    own = [n for n, found in module.members.items() if _public(found) and not found.is_alias and not found.is_module]
    text = f"---\ntitle: {name}\n---\n\n::: {name}\n    options:\n      members: {own or 'false'}\n"
    public = [member for member in module.exports or () if member in module.members and str(member) not in own]
    rows = []
    for member in public:
        target = module.members[member]
        target = target.final_target if target.is_alias else target
        about = "" if target.docstring is None else _first_sentence(target.docstring.value)
        rows.append(f"| [`{member}`][{target.path}] | {about} |")
    if rows:
        text += "\n## Public names\n\n| name | |\n|---|---|\n" + "\n".join(rows) + "\n"
    return text


def _first_sentence(docstring: str) -> str:
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    sentence = re.match(r".*?(?:(?<! al)(?<! cf)(?<! p)[.:](?= |$)|$)", paragraph)
    assert sentence is not None
    return inline(sentence[0].rstrip(".:") + ".").replace("|", "\\|")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Lead links to other files of the repository to their pages; where there is none, keep the text alone."""
    here = page.file.src_uri
    source = SOURCE.get(here, f"docs/{here}")

    def link(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if ":" in target or (path.startswith("docs/") and here not in SOURCE):
            return match[0]
        if path in ("README.md", "docs"):
            path = "docs/README.md"
        there = SITE.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        return text if there is None else f"[{text}]({posixpath.relpath(there, posixpath.dirname(here))}{anchor})"

    def prose(text: str) -> str:
        return _arxiv(re.sub(r"(?<!!)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)", link, text))

    return _outside_code(prose, markdown)


def _outside_code(change: Any, markdown: str) -> str:
    """Change a text, but for its fenced blocks. (Inline code is the business of `change`.)"""
    parts = re.split(r"(^```.*?^```|^ {4}[^\n]*\n)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if i % 2 else change(part) for i, part in enumerate(parts))


def _arxiv(text: str) -> str:
    return re.sub(r"(?<![\[/`])arXiv:(\d{4}\.\d{4,5})(?!`)", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


class Docstrings(griffe.Extension):
    """Docstrings as Markdown: examples as code, "name  meaning" lines as lists of definitions, names in backquotes as
    links, and the fields of a dataclass below its description."""

    def on_package(self, *, pkg: Any, **_: Any) -> None:
        fields: list[Any] = []
        known = {found.path for found in _walk(pkg) if found.is_module or (found.docstring and _public(found))}
        known -= {field.path for found in _walk(pkg) if _is_dataclass(found) for field in _fields(found)}
        for found in _walk(pkg):
            text = "" if found.docstring is None else to_markdown(found.docstring.value)
            if _is_dataclass(found):
                own = [field for base in [*reversed(found.mro()), found] for field in _fields(base)]
                text += "".join(f"\n\n{_field(field)}" for field in {field.name: field for field in own}.values())
                fields += _fields(found)
            if text.strip():
                found.docstring = griffe.Docstring(_linked(text, found, known), parent=found)
        for field in fields:
            field.parent.members.pop(field.name, None)  # shown with their class


def _walk(found: Any) -> Iterator[Any]:
    """Everything that is defined in a module or class."""
    yield found
    for member in list(found.members.values()):
        if not member.is_alias:
            yield from _walk(member)


def _public(found: Any) -> bool:
    return not any(part.startswith("_") for part in found.path.split("."))


def _is_dataclass(found: Any) -> bool:
    return found.is_class and "dataclass" in found.labels


def _fields(cls: Any) -> list[Any]:
    """The fields of a dataclass that have a docstring, without those of its bases."""
    members = [m for m in cls.members.values() if m.is_attribute and not m.is_alias and "property" not in m.labels]
    return [m for m in members if m.annotation and m.docstring and _public(m)]


def _field(field: Any) -> str:
    about = to_markdown(field.docstring.value)
    default = "" if field.value is None else f" = {field.value}"
    return f"`#!python {field.name}: {field.annotation}{default}`\n:   {textwrap.indent(about, ' ' * 4).strip()}"


def to_markdown(docstring: str) -> str:
    """A docstring as this project writes them, as Markdown."""
    blocks = re.split(r"\n\s*\n", docstring.strip("\n"))
    return "\n\n".join(_block(block) for block in blocks)


def _block(block: str) -> str:
    lines = block.split("\n")
    if block.startswith(("    ", "|", "- ", "* ", "1. ", "```", "#")):
        return block
    if _is_python(block):
        return "```python\n" + re.sub(" {3,}#", "  #", block) + "\n```"
    if definitions := _definitions(lines):
        return "\n\n".join(f"`{name}`\n:   {inline(meaning)}" for name, meaning in definitions)
    if any(re.search(r"\S {3,}\S", line) for line in lines) or _is_equation(block):
        narrow = block if len(max(lines, key=len)) < 90 else re.sub(" {5,}", "    ", block)
        return f"```text\n{narrow}\n```"
    return inline(block)


def _is_python(block: str) -> bool:
    """Whether it is a program, and not a sentence that happens to be one."""
    try:
        tree = ast.parse(block)
    except SyntaxError:
        return False
    no_program = (ast.Name, ast.Constant, ast.Tuple, ast.BinOp, ast.Compare, ast.UnaryOp)
    values = [statement.value for statement in tree.body if isinstance(statement, ast.Expr)]
    return not any(isinstance(s, ast.AnnAssign) for s in tree.body) and not any(
        isinstance(v, no_program) for v in values
    )


def _is_equation(block: str) -> bool:
    words = re.search(r"[a-z]{3,} [a-z]{3,}|`", block)
    return len(block.split()) < 30 and words is None and re.search(r" (=|->) ", block) is not None


def _definitions(lines: list[str]) -> list[tuple[str, str]]:
    """(name, meaning) of lines such as "bias    float [N, T, S], added to the scores", whose meaning may go on in lines
    that are indented; empty where a line is none."""
    found: list[tuple[str, str]] = []
    for line in lines:
        if match := re.match(r"([a-z_`][\w.,*()`/ ]*?):?(?: {2,}|(?<=:) )(?=\S)(.*)", line):
            found.append((match[1].strip("`"), re.sub(" {2,}", ": ", match[2], count=1)))
        elif found and line.startswith("  "):
            found[-1] = found[-1][0], f"{found[-1][1]} {line.strip()}"
        else:
            return []
    return found


def inline(text: str) -> str:
    """Plain text with `code` in it as Markdown: what would be markup is escaped, papers are links."""
    parts = re.split(r"(`[^`]+`)", text)
    escaped = (p if i % 2 else _arxiv(re.sub(r"([*_<\[])(?=\S)", r"\\\1", p)) for i, p in enumerate(parts))
    return "".join(escaped)


def _linked(text: str, found: Any, known: set[str]) -> str:
    """Names in backquotes as links to what they name from where they stand."""

    def link(match: re.Match[str]) -> str:
        try:
            path = found.resolve(match[1].removesuffix("()"))
            target = found.modules_collection[path]
            path = target.final_target.path if target.is_alias else target.path
        except (KeyError, AttributeError, griffe.GriffeError):
            return match[0]
        return f"[`{match[1]}`][{path}]" if path in known and path != found.path else match[0]

    return _outside_code(lambda part: re.sub(r"(?<!\[)`([A-Za-z_][\w.]*(?:\(\))?)`(?!\]|\n:)", link, part), text)
