"""A folder's manifest: a description of the content, and the size and SHA-256 of every file. It is written last and
atomically, so that its presence marks the folder as finished.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath  # pathlib that also knows gs://

from gptjax.config import digest
from gptjax.io import atomic
from gptjax.types import Json

NAME = "manifest.json"
Files = dict[str, list[Any]]
"""File name -> [size, SHA-256]."""
_OWN = "ocdbt.process_{}"
"""Folder in which Orbax stores what a process writes."""


def digests(folder: epath.Path, process: int = 0, processes: int = 1) -> Files:
    """Size and SHA-256 of the files that this process wrote, which Orbax says in the names of folders, and for the
    first process of all others. Each looks at its own files alone: what a checkpoint of many processes costs grows with
    its files, not with their product with the processes."""
    if process == 0:
        others = {_OWN.format(i) for i in range(1, processes)}
        return _digests(folder, list(_files(folder, without=others)))
    own = {item.name: item / _OWN.format(process) for item in folder.iterdir()}
    parts = (_files(path, f"{name}/{path.name}/") for name, path in own.items() if path.exists())
    return _digests(folder, list(itertools.chain.from_iterable(parts)))


def write_digests(folder: epath.Path, process: int, files: Files) -> None:
    """Write the digests of a process to the folder, for the process that writes the manifest."""
    (folder / f"{NAME}.{process}").write_text(json.dumps(files))


def read_digests(folder: epath.Path, processes: int) -> Files:
    """Read and delete the digests of the other processes. A process that failed contributes none."""
    files = {}
    for process in range(1, processes):
        path = folder / f"{NAME}.{process}"
        if path.exists():
            files |= json.loads(path.read_text())
            path.unlink()
    return files


def write(folder: epath.Path, content: dict[str, Any], files: Files | None = None) -> None:
    """Write the manifest, which finishes the folder. `content` is added to it, in JSON types. Files that are not in
    `files` are hashed here: all of them, or those that another process could not read or did not yet see."""
    files = files or {}
    files |= _digests(folder, [name for name in _files(folder) if name not in files])
    _write(folder, {**content, "files": dict(sorted(files.items()))})


def amend(folder: epath.Path, **content: Json) -> None:
    """Update the content of a finished folder's manifest, not its files."""
    manifest = read(folder)
    if manifest is None:
        raise OSError(f"{folder / NAME} is not as it was written")
    _write(folder, manifest | content)


def _write(folder: epath.Path, manifest: dict[str, Any]) -> None:
    atomic.write_text(folder / NAME, json.dumps({"sha256": digest(manifest), **manifest}, indent=1))


def read(folder: epath.Path) -> dict[str, Any] | None:
    """The manifest, or None if it is missing or damaged. The files are not verified."""
    try:
        manifest = json.loads((folder / NAME).read_text())
        return manifest if manifest.pop("sha256") == digest(manifest) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def finished(folder: epath.Path) -> bool:
    return (folder / NAME).exists()


def fault(folder: epath.Path, process: int = 0, processes: int = 1) -> str | None:
    """Description of the folder's fault, or None if every byte matches the manifest. Each process verifies its share of
    the files."""
    if not folder.exists():
        return "missing"
    if not finished(folder):
        return "unfinished (it has no manifest)"
    manifest = read(folder)
    if manifest is None:
        return f"damaged ({NAME} is not as it was written)"
    files: Files = manifest["files"]
    names = _share({name: size for name, (size, _) in files.items()}, process, processes)
    try:
        for name in names:
            if (length := (folder / name).stat().length) != (size := files[name][0]):
                return f"damaged ({name} has {length} bytes instead of {size})"
        found = _digests(folder, names)
    except OSError as error:
        return f"damaged ({error})"
    changed = [name for name in sorted(names) if found[name] != files[name]]
    return f"damaged ({', '.join(changed)} is not as it was written)" if changed else None


def delete(folder: epath.Path) -> None:
    """Delete the folder, the manifest first: an interrupted deletion must not leave a folder that looks finished."""
    (folder / NAME).unlink(missing_ok=True)
    folder.rmtree()


def _files(folder: epath.Path, prefix: str = "", without: Collection[str] = ()) -> Iterator[str]:
    """Names of all files except the manifest, and those in folders of these names."""
    for path in sorted(folder.iterdir()):
        name = prefix + path.name
        if path.name in without:
            continue
        if path.is_dir():
            yield from _files(path, f"{name}/", without)
        elif not name.startswith(NAME):
            yield name


def _share(sizes: dict[str, int], process: int, processes: int) -> list[str]:
    """Files of one process: every `processes`-th, ordered by size, so that shares are about equal."""
    return sorted(sizes, key=lambda name: (-sizes[name], name))[process::processes]


def _digests(folder: epath.Path, names: list[str]) -> Files:
    """Size and SHA-256 of each file, on several threads: hashing releases the GIL."""
    with ThreadPoolExecutor() as pool:
        digests = pool.map(lambda name: [(folder / name).stat().length, _sha256(folder / name)], names)
        return dict(zip(names, digests, strict=True))


def _sha256(path: epath.Path) -> str:
    hashed = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            hashed.update(chunk)
    return hashed.hexdigest()
