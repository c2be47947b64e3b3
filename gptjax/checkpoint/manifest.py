"""A folder's manifest: what the folder holds, and the size and SHA-256 of its every file. It is written last and at one
stroke, so that it also says: this folder is finished.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath  # pathlib that also knows gs://

NAME = "manifest.json"
Files = dict[str, list[Any]]
"""Name of a file -> its size and SHA-256."""


def digests(folder: epath.Path, process: int = 0, processes: int = 1) -> Files:
    """Of the files in the folder; of several processes, each reads its share."""
    sizes = {name: (folder / name).stat().length for name in _files(folder)}
    return _digests(folder, _share(sizes, process, processes))


def leave(folder: epath.Path, process: int, files: Files) -> None:
    """Leave the share of a process in the folder, to be collected by the one that writes the manifest."""
    (folder / f"{NAME}.{process}").write_text(json.dumps(files))


def collect(folder: epath.Path, processes: int) -> Files:
    """What the processes after the first have left; one that could not has nothing."""
    files = {}
    for process in range(1, processes):
        part = folder / f"{NAME}.{process}"
        if part.exists():
            files |= json.loads(part.read_text())
            part.unlink()
    return files


def write(folder: epath.Path, content: dict[str, Any], files: Files | None = None) -> None:
    """Finishes the folder. `content` is what else the manifest is to say, in JSON's types; what is not in `files` is
    read here: that is all, or what another process could not read, or did not see yet."""
    files = files or {}
    files |= _digests(folder, [name for name in _files(folder) if name not in files])
    _write(folder, {**content, "files": dict(sorted(files.items()))})


def amend(folder: epath.Path, **content: Any) -> None:
    """Lets the manifest of a finished folder say something else beside its files."""
    manifest = read(folder)
    if manifest is None:
        raise OSError(f"{folder / NAME} is not as it was written")
    _write(folder, manifest | content)


def _write(folder: epath.Path, manifest: dict[str, Any]) -> None:
    temporary = folder / f"{NAME}.tmp"
    temporary.write_text(json.dumps({"sha256": _sha256_of_json(manifest), **manifest}, indent=1))
    temporary.replace(folder / NAME)


def read(folder: epath.Path) -> dict[str, Any] | None:
    """The manifest, or None when there is none or it is not as it was written. The files are not looked at."""
    try:
        manifest = json.loads((folder / NAME).read_text())
        return manifest if manifest.pop("sha256") == _sha256_of_json(manifest) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def finished(folder: epath.Path) -> bool:
    return (folder / NAME).exists()


def fault(folder: epath.Path, process: int = 0, processes: int = 1) -> str | None:
    """What is wrong with the folder; None when every byte of it is as it was written. Of several processes, each looks
    at its share of the files."""
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
    """Deletes the folder, the manifest first: a deletion that is cut short must not leave what looks finished."""
    (folder / NAME).unlink(missing_ok=True)
    folder.rmtree()


def _files(folder: epath.Path, prefix: str = "") -> Iterator[str]:
    """The name of every file but the manifest."""
    for path in sorted(folder.iterdir()):
        name = prefix + path.name
        if path.is_dir():
            yield from _files(path, f"{name}/")
        elif not name.startswith(NAME):
            yield name


def _share(sizes: dict[str, int], process: int, processes: int) -> list[str]:
    """The files of a process: every so many-th of all, the largest first, so that shares are about equal."""
    return sorted(sizes, key=lambda name: (-sizes[name], name))[process::processes]


def _digests(folder: epath.Path, names: list[str]) -> Files:
    """Hashing lets other threads run."""
    with ThreadPoolExecutor() as pool:
        digests = pool.map(lambda name: [(folder / name).stat().length, _sha256(folder / name)], names)
        return dict(zip(names, digests, strict=True))


def _sha256(path: epath.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _sha256_of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
