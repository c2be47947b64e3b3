"""Built-in corpus as a TFDS data set: the documentation in every CPython, as ArrayRecord, without TensorFlow.

`pydoc_data.topics` is the language reference by topic. The standard library's docstrings are read from its source with
`ast`, so nothing is imported or run. Repeated paragraphs are kept once, and the split is by a hash of the last part of
the name, so that a method and its overrides are together: no text is in both splits.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import json
import logging
import os
import platform
import re
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import tensorflow_datasets as tfds

from gptjax.data.files import cache_dir
from gptjax.data.sources import held_out
from gptjax.types import UserError

VALIDATION = 0.1
Kind = Literal["topic", "module", "class", "function"]
KINDS: dict[type[ast.AST], Kind] = {
    ast.Module: "module",
    ast.ClassDef: "class",
    ast.FunctionDef: "function",
    ast.AsyncFunctionDef: "function",
}
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
SKIPPED = {"test", "tests", "idle_test", "idlelib", "lib2to3", "pydoc_data", "site-packages", "dist-packages"}
COMMON = 60
"""Paragraphs shorter than this, in characters, may be repeated ("Returns None.")."""


@dataclasses.dataclass(frozen=True)
class Doc:
    """Documentation of one `name`, such as "textwrap.dedent". Topics and modules have no signature."""

    name: str
    kind: Kind
    signature: str
    text: str

    @property
    def key(self) -> str:
        """Last part of the name. Documentation with the same one is in the same split."""
        return self.name.rpartition(".")[2]

    @property
    def split(self) -> Literal["train", "validation"]:
        return "validation" if held_out(self.key, VALIDATION) else "train"


@dataclasses.dataclass(eq=False, kw_only=True)
class PydocsConfig(tfds.core.BuilderConfig):
    root: str | None = None
    """Folder of Python files to read instead of the standard library and the topics. None: those."""


class Pydocs(tfds.core.GeneratorBasedBuilder):
    """Documentation of Python: topics of the language reference, docstrings of modules, classes and functions."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [PydocsConfig(name=f"{sys.implementation.name}-{platform.python_version()}")]  # noqa: RUF012
    # TFDS would find this file with importlib_resources, which it does not install.
    code_path = tfds.core.Path(__file__)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict({"name": text(), "kind": text(), "signature": text(), "text": text()}),
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager):
        config: Any = self.builder_config
        metadata: Any = self.info.metadata
        docs = collect(config.root)
        metadata["sha256"] = digest(docs)
        splits = {split: [doc for doc in docs if doc.split == split] for split in ("train", "validation")}
        if not all(splits.values()):
            raise UserError(f"root: got {config.root}, whose {len(docs)} docstrings are too few to hold some out")
        return {split: self._generate_examples(part) for split, part in splits.items()}

    def _generate_examples(self, docs: Iterable[Doc]):
        for doc in docs:
            yield f"{doc.kind} {doc.name}", dataclasses.asdict(doc)


@functools.cache
def load(data_dir: str | None = None, root: str | None = None) -> tuple[Doc, ...]:
    """All documents, in the fixed shuffled order of the data set in `data_dir` (None: the cache folder). A missing or
    damaged data set is built, in a few seconds. Raises UserError."""
    root = root and str(Path(root).expanduser().resolve())
    config = Pydocs.BUILDER_CONFIGS[0] if root is None else PydocsConfig(name=_stamp(Path(root)), root=root)
    parent = Path(data_dir).expanduser() if data_dir else cache_dir() / "datasets"
    folder = parent / "pydocs" / config.name / str(Pydocs.VERSION)
    if folder.exists():
        try:
            return _read(folder)
        except Exception as damage:  # libraries raise various exceptions for damaged files
            logging.getLogger(__name__).warning("%s is damaged (%s), so it is built anew", folder, damage)
            shutil.rmtree(folder)
    tfds.disable_progress_bar()
    builder: Any = Pydocs
    try:
        with contextlib.redirect_stdout(None):
            builder(config=config, data_dir=parent, file_format="array_record").download_and_prepare()
    except OSError as error:
        if not folder.exists():  # otherwise another process built it first
            raise UserError(f"data_dir: got {parent}, which cannot be written ({error}); give another folder") from None
    return _read(folder)


def _read(folder: Path) -> tuple[Doc, ...]:
    builder: Any = tfds.builder_from_directory(folder)
    docs = []
    for split in ("train", "validation"):
        source = builder.as_data_source(split)
        for record in source.__getitems__(range(len(source))):
            docs.append(Doc(**{key: value.decode() for key, value in record.items()}))
    if digest(docs) != builder.info.metadata["sha256"]:
        raise ValueError("its content does not match its checksum")
    return tuple(docs)


def digest(docs: Iterable[Doc]) -> str:
    """SHA-256, in hex, of the documents in any order."""
    return hashlib.sha256(json.dumps(sorted(map(dataclasses.astuple, docs))).encode()).hexdigest()


def collect(root: str | None = None) -> list[Doc]:
    """Documentation of this Python, or of the Python files under `root`, without repetitions."""
    if root is None:
        return unique([*_topics(), *_docstrings(Path(sysconfig.get_path("stdlib")))])
    return unique(_docstrings(Path(root)))


def unique(docs: Iterable[Doc]) -> list[Doc]:
    """Remove repetitions: a paragraph of several documents stays in the shortest, usually the most specific one."""
    kept, seen = [], set()
    for doc in sorted(docs, key=lambda doc: (len(doc.text), doc.name)):
        paragraphs = re.split(r"\n[ \t]*\n", doc.text)
        fresh = [p for p in paragraphs if len(p) < COMMON or _normal(p) not in seen]
        text = "\n\n".join(fresh).strip("\n")
        identities = {(doc.kind, doc.name), _normal(text)}
        if _normal(text) and not identities & seen:
            kept.append(dataclasses.replace(doc, text=text))
            seen |= identities | {_normal(p) for p in fresh}
    return kept


def _normal(text: str) -> str:
    return " ".join(text.split()).lower()


def _topics() -> Iterator[Doc]:
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise UserError(
            f"pydocs: got a Python without pydoc_data.topics ({sys.executable}), must be a complete CPython; install "
            f"your distribution's full standard library (Debian: libpython3-stdlib) or use python.org's or uv's Python"
        ) from None
    for name, text in sorted(topics.items()):
        yield Doc(name, "topic", "", text.strip())


def _docstrings(root: Path) -> Iterator[Doc]:
    top = root.parent if (root / "__init__.py").exists() else root
    for path in _files(root):
        try:
            with warnings.catch_warnings(action="ignore"):  # invalid escapes in other people's code
                module = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            logging.getLogger(__name__).info("%s is not Python %s", path, platform.python_version())
            continue
        name = ".".join(path.relative_to(top).with_suffix("").parts).removesuffix(".__init__")
        for qualified, node in [(name, module), *_definitions(module.body, name)]:
            if text := ast.get_docstring(node):
                yield Doc(qualified, KINDS[type(node)], _signature(qualified, node), text)


def _files(root: Path) -> list[Path]:
    """Python files under `root`, in a platform-independent order."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name.isidentifier() and name not in SKIPPED]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    if not found:
        raise UserError(f"root: got {root}, must be a folder that holds Python files")
    return sorted(found)


def _definitions(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, Definition]]:
    """Functions and classes with their qualified names, including those under `if` and `try`, excluding those in
    functions."""
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{prefix}.{node.name}", node
        if isinstance(node, ast.ClassDef):
            yield from _definitions(node.body, f"{prefix}.{node.name}")
        elif isinstance(node, ast.If | ast.Try):
            branches = [node.body, node.orelse, *(handler.body for handler in getattr(node, "handlers", []))]
            yield from _definitions([child for branch in branches for child in branch], prefix)


def _signature(name: str, node: ast.AST) -> str:
    """Signature of a function, or of a class with an `__init__`: "textwrap.dedent(text)". Otherwise ""."""
    if isinstance(node, ast.ClassDef):
        node = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), node)
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return ""
    arguments = re.sub(r"^(self|cls)(, /)?(, |$)", "", ast.unparse(node.args))
    return f"{name}({arguments})" + (f" -> {ast.unparse(node.returns)}" if node.returns else "")


def _stamp(root: Path) -> str:
    """Identifier of the state of the Python files under `root`."""
    state = [(str(path.relative_to(root)), path.stat().st_size, path.stat().st_mtime_ns) for path in _files(root)]
    return f"root-{hashlib.sha256(json.dumps(state).encode()).hexdigest()[:12]}"
