"""Sources of documents: TFDS data sets, text files, labelled texts. (`tables.py` and `conversations.py` have more.)

A source is a frozen dataclass with two methods. `documents(split)` streams the documents of "train" or "validation",
one at a time, so memory does not grow with the corpus. `fingerprint()` identifies the content, so that its tokens can
be cached. Any class with these two methods is a source.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from gptjax.data.files import Where, file_state, find_files, read_json, read_lines
from gptjax.protocols import Source, Split
from gptjax.types import Json, UserError

Document = TypeVar("Document")

HELD_OUT = 0.1
"""Fraction held out of a data set without a validation split."""

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TFDS:
    """A prepared TensorFlow Datasets data set, read without TensorFlow, in ArrayRecord or another format with random
    access. https://www.tensorflow.org/datasets"""

    name: str
    """Name in the catalogue, such as "lm1b" or "c4/en:3.0.1", or a folder with a dataset_info.json."""
    data_dir: str | None = None
    """Folder of data sets, local or gs://. None: $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    text: str = "text"
    """Feature with the document."""
    train: str = "train"
    """Training split. Slices such as "train[:90%]" work."""
    validation: float | str | None = None
    """Validation split, or the fraction of the training split to hold out, chosen by a hash of the document. None: the
    split "validation" if there is one, else a tenth. 0: none."""

    def __post_init__(self) -> None:
        if not isinstance(self.validation, str | None):
            check_fraction(self.validation)

    def documents(self, split: Split) -> Iterator[str]:
        builder = _builder(self)
        part, fraction = part_of(self, split, list(builder.info.splits))
        if fraction is None:
            yield from self._texts(builder, split, part)
        else:
            texts = self._texts(builder, "train", part)
            yield from of_split(((text, text) for text in texts), split, self.name, fraction)

    def _texts(self, builder: Any, split: Split, part: str) -> Iterator[str]:
        """All texts of a part of the data set."""
        if self.text not in builder.info.features:
            raise UserError(
                f"text: got {self.text}, must be a feature of {self.name}: {', '.join(builder.info.features)}"
            )
        try:
            count, read = _records(builder, part)
        except ValueError as error:
            raise UserError(
                f"{split}: got {part}, must be a split of {self.name}: {str(error).splitlines()[0]}"
            ) from None
        for start in range(0, count, 256):
            for index, record in enumerate(read(range(start, min(start + 256, count))), start):
                try:
                    text = record[self.text].decode()
                except UnicodeDecodeError:
                    raise UserError(f"name: got {self.name}, where example {index} of {part} is not UTF-8") from None
                if text.strip():
                    yield text

    def fingerprint(self) -> str:
        builder = _builder(self)
        return fingerprint(self, str(builder.data_dir), (builder.data_path / "dataset_info.json").read_text())


@dataclasses.dataclass(frozen=True)
class Text:
    """Plain text files. A single file without a separator is split by position, its end being the validation split
    (nanoGPT's 90/10). Otherwise each document is assigned to a split by its hash."""

    path: str
    """A file, a glob such as "books/*.txt", or an http(s) URL. Files may be gzipped (.gz)."""
    separator: str | None = None
    """Separator of the documents in a file, such as "\\n" or "<|endoftext|>". None: one document per file."""
    validation: float = 0.1
    """Fraction held out for validation, at least 0 and below 1. 0: none."""
    invalid: Literal["error", "skip"] = "error"
    """Treatment of lines that are not UTF-8: "error" stops, "skip" leaves the line out and logs the number."""

    def __post_init__(self) -> None:
        check_fraction(self.validation)
        if self.separator == "":
            raise UserError('separator: got "", must be a text such as "\\n", or none for a whole file a document')

    def documents(self, split: Split) -> Iterator[str]:
        paths = find_files(self.path)
        if self.separator is None and len(paths) == 1:
            text = "".join(line for _, line in read_lines(paths[0], self.invalid))
            cut = int(len(text) * (1 - self.validation))
            part = text[:cut] if split == "train" else text[cut:]
            if not part.strip():
                raise _no_documents(split, self.path, self.validation)
            yield part
        else:
            documents = (document for path in paths for document in self._divide(path))
            documents = documents if self.separator is None else self._counted(documents, len(paths))
            yield from of_split(((document, document) for document in documents), split, self.path, self.validation)

    def fingerprint(self) -> str:
        return fingerprint(self, *file_state(self.path))

    def files(self) -> Iterator[tuple[Source[str], int]]:
        """A source of each file, in order, and the size of the file in bytes."""
        return iter([(self, 0)]) if self.separator is None else one_each(self)

    def _counted(self, documents: Iterator[str], files: int) -> Iterator[str]:
        """The documents, and a warning if the separator divided nothing."""
        count = 0
        for document in documents:
            yield document
            count += 1
        if count <= files:
            log.warning("separator: %r is nowhere in %s, so every file is one document", self.separator, self.path)

    def _divide(self, path: Path) -> Iterator[str]:
        pending, searched = "", 0
        for _, line in read_lines(path, self.invalid):
            pending += line
            if self.separator is None:
                continue
            while (at := pending.find(self.separator, searched)) >= 0:
                if pending[:at].strip():
                    yield pending[:at]
                pending, searched = pending[at + len(self.separator) :], 0
            searched = max(0, len(pending) - len(self.separator) + 1)
        if pending.strip():
            yield pending


@dataclasses.dataclass(frozen=True)
class Example:
    """A text and its class, counted from 0, or its number."""

    text: str
    label: int | float


@dataclasses.dataclass(frozen=True)
class JsonRows:
    """Documents in the rows of JSON files. Base class; a subclass defines `read`."""

    path: str
    """A file, a glob, or an http(s) URL. Files may be gzipped (.gz)."""
    validation: float = dataclasses.field(default=0.1, kw_only=True)
    """Fraction of the documents held out for validation, chosen by a hash. 0: none."""
    invalid: Literal["error", "skip"] = dataclasses.field(default="error", kw_only=True)
    """Treatment of lines that are not UTF-8: "error" stops, "skip" leaves the line out and logs the number."""

    def __post_init__(self) -> None:
        check_fraction(self.validation)

    def documents(self, split: Split) -> Iterator[Any]:
        rows = (row for path in find_files(self.path) for row in read_json(path, self.invalid))
        return of_split((document for row in rows for document in self.read(*row)), split, self.path, self.validation)

    def fingerprint(self) -> str:
        return fingerprint(self, *file_state(self.path))

    def files(self) -> Iterator[tuple[Source[Any], int]]:
        """A source of each file, in order, and the size of the file in bytes."""
        return one_each(self)

    def read(self, where: Where, row: Json) -> Iterable[tuple[str, Any]]:
        """Documents of a row, each with its key, by which its split is chosen. Raises UserError, with the place."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class LabelledJsonl(JsonRows):
    """Labelled texts, one per line: `{"text": "What a film!", "label": "good"}`."""

    classes: tuple[str | int, ...]
    """Labels of the classes, in order from class 0."""
    text: str = "text"
    """Field with the text."""
    label: str = "label"
    """Field with the label."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.classes)) != len(self.classes) or len(self.classes) < 2:
            raise UserError(f"classes: got {self.classes}, must be at least two labels, no two alike")

    def read(self, where: Where, row: Json) -> Iterable[tuple[str, Example]]:
        text, label = _labelled(where, row, self.text, self.label)
        if label not in self.classes:
            labels = ", ".join(map(repr, self.classes))
            raise UserError(f"classes: {where}: got the label {label!r}, must be one of {labels}")
        return [(text, Example(text, self.classes.index(label)))] if text.strip() else []


@dataclasses.dataclass(frozen=True)
class NumbersJsonl(JsonRows):
    """Texts with numbers, one per line: `{"text": "What a film!", "label": 4.5}`."""

    text: str = "text"
    """Field with the text."""
    label: str = "label"
    """Field with the number."""

    def read(self, where: Where, row: Json) -> Iterable[tuple[str, Example]]:
        text, label = _labelled(where, row, self.text, self.label)
        number = finite(label, f"path: {where}: {self.label}")
        return [(text, Example(text, number))] if text.strip() else []


def _labelled(where: Where, row: Json, text: str, label: str) -> tuple[str, Json]:
    """The text and the label in these fields of a row."""
    if not isinstance(row, dict) or not isinstance(row.get(text), str) or label not in row:
        found = f"the fields {', '.join(row)}" if isinstance(row, dict) else type(row).__name__
        raise UserError(f'path: {where}: got {found}, must be an object with a text in "{text}" and a "{label}"')
    return row[text], row[label]


def finite(value: Any, field: str) -> float:
    """A value of a file as a finite number. Raises UserError that names the field."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{field}: got {str(value)[:80]!r}, must be a finite number")
    return float(value)


def fingerprint(source: Any, *state: object) -> str:
    """SHA-256, in hex, of a source's class, its fields and the state of its files."""
    content = [type(source).__name__, dataclasses.asdict(source), *state]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def held_out(key: str, fraction: float) -> bool:
    """True if `key` is held out for validation, as this `fraction` of all keys is. A pure function of the key."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:8], "big") < fraction * 2**64


def check_fraction(validation: float) -> None:
    if not 0 <= validation < 1:
        raise UserError(f"validation: got {validation}, must be a fraction from 0 up to but without 1")


def part_of(source: Any, split: Split, names: Sequence[str]) -> tuple[str, float | None]:
    """Part of a data set with splits of its own that `split` is read from, by the source's `train` and `validation`,
    and the fraction of it that is held out; or None, if all of it is read.

    names  splits of the data set. One without "validation" has a tenth of `train` held out, which is logged."""
    validation = source.validation
    if validation is None and "validation" in names:
        validation = "validation"
    elif validation is None:
        validation = HELD_OUT
        if split == "validation":
            log.warning(
                "%s has no split named validation, but %s; a tenth of %s, chosen by a hash, is held out (say otherwise "
                "with validation)",
                source,
                ", ".join(names),
                source.train,
            )
    if isinstance(validation, str):
        return (source.train if split == "train" else validation), None
    return source.train, validation


def of_split(keyed: Iterable[tuple[str, Document]], split: Split, path: str, validation: float) -> Iterator[Document]:
    """Documents whose key belongs to `split`."""
    empty = True
    for key, document in keyed:
        if held_out(key, validation) == (split == "validation"):
            empty = False
            yield document
    if empty:
        raise _no_documents(split, path, validation)


class NoDocuments(UserError):
    """A split without documents."""


def one_each(source: Any) -> Iterator[tuple[Any, int]]:
    """The source of each file of a source, in order, and the size of the file in bytes."""
    for file in find_files(source.path):
        yield dataclasses.replace(source, path=glob.escape(str(file))), file.stat().st_size


def _no_documents(split: Split, path: str, validation: float) -> NoDocuments:
    fraction = "a smaller fraction" if split == "train" else "a larger fraction, or 0 for no validation loss"
    return NoDocuments(
        f"validation: got {validation}, which leaves no document of {path} for {split}; give more text, or {fraction}"
    )


def _builder(source: TFDS) -> Any:
    """Builder of a prepared data set. Raises UserError if it does not exist."""
    import tensorflow_datasets as tfds
    from etils import epath

    folder = epath.Path(source.data_dir or "").expanduser() / source.name
    try:
        with _only_features_of_tfds():
            if (folder / "dataset_info.json").exists():
                return tfds.builder_from_directory(folder)
            builder = tfds.builder(source.name, data_dir=source.data_dir)
    except UserError:
        raise
    except (ValueError, AssertionError):  # raised for an unknown name, configuration or version
        builder = None
    if builder is None or not builder.info.splits:
        raise UserError(
            f"name: got {source.name}, must be a data set prepared in {source.data_dir or '~/tensorflow_datasets'} or "
            f'a folder with a dataset_info.json; prepare it once with: python -c "import tensorflow_datasets as tfds; '
            f"tfds.builder({source.name!r}, data_dir={source.data_dir!r}, file_format='array_record')"
            f'.download_and_prepare()" (most of the catalogue needs tensorflow installed for that)'
        )
    return builder


@contextlib.contextmanager
def _only_features_of_tfds() -> Iterator[None]:
    """Context in which TFDS does not import modules that a data set's files name for features of other packages."""
    from tensorflow_datasets.core.features.feature import FeatureConnector

    original = vars(FeatureConnector)["cls_from_name"]

    def find(cls: Any, name: str) -> Any:
        if not name.startswith("tensorflow_datasets.") and name not in cls._registered_features:
            raise UserError(
                f"name: got a data set with the feature {name}, must be features of TFDS; import its module"
            )
        return original.__get__(None, cls)(name)

    FeatureConnector.cls_from_name = classmethod(find)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        FeatureConnector.cls_from_name = original


def _records(builder: Any, split: str) -> tuple[int, Callable[[range], list[dict[str, Any]]]]:
    """Number of examples in `split`, and a function that reads a range of them."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    info = builder.info
    if info.available_file_formats() & tfds.core.FileFormat.with_random_access():
        source = builder.as_data_source(split)
        return len(source), source.__getitems__
    # Data sets are often converted in place, without an entry for ArrayRecord in dataset_info.json.
    beside = sorted(builder.data_path.glob("*.array_record-*-of-*"))
    if not beside:
        raise UserError(
            f"name: got {info.full_name}, prepared in {builder.data_dir} as {info.file_format.value} alone, must be "
            f"ArrayRecord; write it anew with `tfds convert_format --dataset_version_dir={builder.data_dir} "
            f"--out_file_format=array_record`"
        )
    prefix = beside[0].name.split("-")[0]
    splits = tfds.core.SplitDict(
        part.replace(
            filename_template=part.filename_template.replace(dataset_name=prefix, filetype_suffix="array_record")
        )
        for part in info.splits.values()
    )
    instructions: Any = splits[split].file_instructions
    source = ArrayRecordDataSource(instructions)
    return len(source), lambda rows: [info.features.deserialize_example_np(r) for r in source.__getitems__(rows)]
