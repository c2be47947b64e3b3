"""Data sets of Hugging Face's `datasets` library: from the hub, a folder of data files, or `save_to_disk`.

    data.Pretrain(data.HFDataset("HuggingFaceFW/fineweb-edu", config="sample-10BT", streaming=True, limit=1_000_000))
    data.Chat(data.Conversations(data.HFDataset("HuggingFaceH4/ultrachat_200k", train="train_sft")))

The hub's usual environment variables apply: `HF_HOME` (the cache), `HF_ENDPOINT` (the server), `HF_TOKEN` (the user).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gptjax.data.files import Where
from gptjax.data.sources import check_fraction, fingerprint, of_split, part_of
from gptjax.data.tables import Document, OfRow, Table, column, without_nulls
from gptjax.io import retry
from gptjax.protocols import Split
from gptjax.types import UserError, one_line

READERS = ("arrow", "csv", "json", "parquet", "text")
"""Kinds of files that are read. Others of the library's may run what the files bring (pickles)."""


@dataclasses.dataclass(frozen=True)
class HFDataset(Table):
    """A data set of Hugging Face's `datasets` library: its name on the hub, a folder of Parquet, JSON, CSV, Arrow or
    text files, or one that `save_to_disk` wrote. https://huggingface.co/docs/datasets"""

    path: str
    """Name on the hub, such as "HuggingFaceFW/fineweb-edu", or a folder."""
    config: str | None = None
    """Configuration (subset) of the data set. None: its default."""
    train: str = "train"
    """Training split. Slices such as "train[:90%]" work, except in streams and saved folders."""
    validation: float | str | None = None
    """Validation split, or the fraction of the training split to hold out, chosen by a hash of the document. None: the
    split "validation" if there is one, else a tenth. 0: none."""
    revision: str | None = None
    """Branch, tag or commit on the hub. None: the newest."""
    streaming: bool = False
    """Read from the hub without downloading first: only as much as `limit` asks for."""
    limit: int | None = None
    """Maximum number of rows of a split, the first ones. None: all."""

    def __post_init__(self) -> None:
        if not isinstance(self.validation, str | None):
            check_fraction(self.validation)
        if self.limit is not None and self.limit < 1:
            raise UserError(f"limit: got {self.limit}, must be at least 1, or None")

    def read(self, split: Split, of_row: OfRow[Document], columns: Sequence[str] | None = None) -> Iterator[Document]:
        opened = self._open()
        name, fraction = self._part(split, opened)
        rows = itertools.islice(self._rows(opened, name, columns), self.limit)
        keyed = (document for row in rows if (document := of_row(*row)) is not None)
        if fraction is not None:
            yield from of_split(keyed, split, self.path, fraction)
            return
        empty = True
        for _, document in keyed:
            empty = False
            yield document
        if empty:
            raise UserError(f"{split}: got {name}, which has no document in {self.path}; must have at least one")

    def fingerprint(self) -> str:
        if (folder := Path(self.path).expanduser()).is_dir():
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            stats = [(str(path.relative_to(folder)), path.stat()) for path in files]
            state = [[name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for name, stat in stats]
            return fingerprint(self, str(folder.resolve()), state)
        return fingerprint(self, self._open().hash)

    def _part(self, split: Split, opened: Any) -> tuple[str, float | None]:
        """Split of the data set to read, and the fraction of it that is held out. None: all of it is read."""
        names = _splits(opened)
        name, fraction = part_of(self, split, names)
        if (base := re.sub(r"\[.*", "", name)) not in names:
            raise UserError(f"{split}: got {base}, must be a split of {self.path}: {', '.join(names)}")
        if base != name and (self.streaming or isinstance(opened, dict)):
            raise UserError(f"{split}: got {name}, must be a whole split here: {', '.join(names)}; give a limit")
        return name, fraction

    def _open(self) -> Any:
        """The library's builder, or a dictionary of the splits of a saved folder. Raises UserError."""
        try:
            import datasets
        except ImportError:
            raise UserError("path: HFDataset needs the datasets library; pip install 'gptjax[hf]'") from None
        folder = Path(self.path).expanduser()
        saved = {name for name in ("dataset_dict.json", "state.json") if (folder / name).is_file()}
        if saved:
            with _named(self.path):
                found = datasets.load_from_disk(str(folder))
            return dict(found) if isinstance(found, datasets.DatasetDict) else {self.train: found}
        if folder.exists() and not folder.is_dir():
            raise UserError(
                f"path: got the file {self.path}, must be a folder or a name; Parquet, Jsonl and Csv read files"
            )
        with _named(self.path):  # the library has retried what may recover
            builder = datasets.load_dataset_builder(str(folder), self.config, revision=self.revision)
        kind = type(builder).__module__.split(".")[-1]
        if kind not in READERS:
            raise UserError(f"path: got {self.path}, of {kind} files, must be of {', '.join(READERS)} files")
        return builder

    def _rows(self, opened: Any, name: str, columns: Sequence[str] | None) -> Iterator[tuple[Where, Any]]:
        with _named(self.path, retry.transient):
            if isinstance(opened, dict):
                rows = opened[name]
            elif self.streaming:
                rows = opened.as_streaming_dataset(split=name)
            else:
                opened.download_and_prepare()
                rows = opened.as_dataset(split=name)
            for wanted in columns or () if rows.column_names else ():
                column(dict.fromkeys(rows.column_names), wanted, Where(f"{self.path}, {name}", 1), "text")
            if columns and rows.column_names:
                rows = rows.select_columns(list(columns))
            for number, row in enumerate(rows, 1):
                yield Where(f"{self.path}, {name}", number), without_nulls(row)


def _splits(opened: Any) -> list[str]:
    """Names of the splits."""
    if isinstance(opened, dict):
        return list(opened)
    return [str(name) for name in opened.config.data_files or opened.info.splits or ()]


@contextlib.contextmanager
def _named(path: str, passes: Callable[[BaseException], bool] = lambda _: False) -> Iterator[None]:
    """Context in which an error of the library becomes a UserError that names the data set, except those that `passes`
    lets through, for another attempt."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if type(error).__module__.startswith("httpx"):  # not an OSError, as broken connections are elsewhere
            error = ConnectionError(one_line(error))
        if passes(error):
            raise error from None
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        said = one_line(error) if cause is error else f"{one_line(error)}: {one_line(cause)}"
        raise UserError(
            f"path: got {path}, which cannot be read ({said}); must be a data set of the hub (a private one needs "
            "`hf auth login` or HF_TOKEN), a folder of data files, or one that save_to_disk wrote"
        ) from None
