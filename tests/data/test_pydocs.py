"""The embedded corpus: built from source text alone, the same every time, nothing on both sides."""

import json
import sys
from pathlib import Path

import pytest

from gptjax.data import pydocs_builder
from gptjax.data.pydocs import LIMIT, PyDocs, PyDocsChat, answer
from gptjax.types import UserError

MODULE = '''"""Tools for {name} things. They are small.

A paragraph that every one of these modules repeats word for word, so it is long enough.
"""
raise RuntimeError("this module must never be imported")

def public(a, /, b: int = 1, *args, c="x", **kw) -> str:
    """Return what the {name} of a and b is.

    >>> public(1)
    """

if True:
    class Thing:
        """A thing of {name}, e.g. Some object. It is used thus:

        - like this
        """

        def __init__(self, size=(1, 2)):
            pass

        async def method(self):
            """return the {name} method"""

        def _private(self):
            """Do what nobody outside {name} should know."""
'''


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A little library of 30 modules, with tests and broken files in it."""
    root = tmp_path_factory.mktemp("library")
    for folder in ("package", "tests", "not-a-package"):
        (root / folder).mkdir()
        (root / folder / "__init__.py").write_text(f'"""The init of {folder}: Some words."""\n')
    for n in range(30):
        (root / "package" / f"m{n:02}.py").write_text(MODULE.replace("{name}", f"m{n:02}"))
    (root / "copy.py").write_text(MODULE.replace("{name}", "m07"))
    (root / "broken.py").write_text("def :")
    return str(root)


def docs(tmp_path, root):
    pydocs_builder.load.cache_clear()
    return pydocs_builder.load(str(tmp_path), root)


def test_builds_from_source_text_alone(tmp_path, root):
    found = {doc.name: doc for doc in docs(tmp_path, root)}
    assert found["package"].text == "The init of package: Some words."
    assert found["package.m03.public"].signature == "package.m03.public(a, /, b: int=1, *args, c='x', **kw) -> str"
    assert found["package.m03.Thing"].signature == "package.m03.Thing(size=(1, 2))"
    assert found["package.m03.Thing.method"].signature == "package.m03.Thing.method()"
    assert [found[f"package.m03{name}"].kind for name in ("", ".Thing", ".public")] == ["module", "class", "function"]
    assert not any(name.startswith(("tests", "not", "broken")) for name in found)
    assert "tensorflow" not in sys.modules


def test_every_text_once(tmp_path, root):
    texts = [doc.text for doc in docs(tmp_path, root)]
    assert len(texts) == len(set(texts)) == 1 + 5 * 30  # the copy of m07 adds nothing
    assert sum("repeats word for word" in text for text in texts) == 1


def test_sides_are_disjoint_and_the_same_every_time(tmp_path, root):
    first = [list(PyDocs(str(tmp_path / "1"), root).documents(split)) for split in ("train", "validation")]
    pydocs_builder.load.cache_clear()
    again = PyDocs(str(tmp_path / "2"), root)
    assert first == [list(again.documents(split)) for split in ("train", "validation")]
    assert again.fingerprint() == PyDocs(str(tmp_path / "1"), root).fingerprint() != PyDocsChat(root=root).fingerprint()
    sides = {doc.name.rpartition(".")[2]: doc.split for doc in docs(tmp_path / "1", root)}
    assert all(doc.split == sides[doc.name.rpartition(".")[2]] for doc in docs(tmp_path / "1", root))
    assert first[0]
    assert first[1]
    assert not set(first[0]) & set(first[1])
    assert "# package.m03.Thing.method()\n\nreturn the m03 method\n" in first[0] + first[1]


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "info"])
def test_a_damaged_data_set_is_built_anew(tmp_path, root, damage, caplog):
    whole = docs(tmp_path, root)
    (file,) = tmp_path.rglob("*train.array_record*")
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        content[200] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "remove":
        file.unlink()
    else:
        (file.parent / "dataset_info.json").write_text("{")
    assert docs(tmp_path, root) == whole
    assert "is damaged" in caplog.text


def test_what_cannot_be_built(tmp_path, root, monkeypatch):
    with pytest.raises(UserError, match=r"root: got .*empty"):
        docs(tmp_path, str(tmp_path / "empty"))
    (tmp_path / "one.py").write_text('"""The only docstring."""')
    with pytest.raises(UserError, match=r"root: got .* too few"):
        docs(tmp_path, str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data_dir: got .*file"):
        docs(tmp_path / "file", root)
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(UserError, match=r"without pydoc_data\.topics"):
        docs(tmp_path, None)


def test_conversations(tmp_path, root):
    source = PyDocsChat(str(tmp_path), root)
    sides = [list(source.documents(split)) for split in ("train", "validation")]
    assert all(len(side) > 5 for side in sides)
    questions = [chat[0].content for chat in sides[0] + sides[1]]
    assert len(set(questions)) == len(questions)
    for chat in sides[0] + sides[1]:
        assert [message.role for message in chat] == ["user", "assistant"] * (len(chat) // 2)
        assert all(10 <= len(message.content) <= LIMIT for message in chat)
        assert all(message.content[-1] in ".?" for message in chat)
        assert "_private" not in chat[0].content
    assert any(len(chat) == 4 for chat in sides[0])
    questions = source.questions(3)
    assert len(questions) == 3
    assert set(questions) <= {(chat[0].content, chat[1].content) for chat in sides[1]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Return it.\n\n>>> f()\n1", "Return it."),
        ("f(x) -> int\n\nadd one to\n  x, e.g. One and more", "Add one to."),
        ("Title\n=====\n\nFirst one. Second one.\n\nThird one. See:\n\n* a", "First one. Second one. Third one."),
        ("Takes a flag:\n\n- one", ""),
        ("Usage:  prog [options]   -- see", ""),
        ("One is first. " + "Two is long " * 40, "One is first."),
        ("Long " * 99, ""),
        ("", ""),
    ],
)
def test_answers_are_whole_sentences(text, expected):
    assert answer(text) == expected


def test_the_documentation_of_this_python():
    pytest.importorskip("pydoc_data.topics")
    package = {doc.name: doc for doc in pydocs_builder.collect(str(Path(json.__file__).parent))}
    assert package["json.dumps"].signature.startswith("json.dumps(obj, *, skipkeys=False, ")
    assert answer(package["json.dumps"].text).startswith("Serialize ``obj`` to a JSON formatted ``str``. ")
    topics = pydocs_builder.unique(pydocs_builder._topics())
    assert len(topics) > 50
    assert sum(len(doc.text) for doc in topics) > 300_000
    train, validation = (
        {p.strip() for doc in topics if doc.split == split for p in doc.text.split("\n\n") if len(p) >= 60}
        for split in ("train", "validation")
    )
    assert min(len(train), len(validation)) > 10
    assert not train & validation
