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


def write(folder: epath.Path, content: dict[str, Any]) -> None:
    """Finishes the folder. `content` is what else the manifest is to say, in JSON's types."""
    files = {name: [(folder / name).stat().length, _sha256(folder / name)] for name in _files(folder)}
    manifest = {**content, "files": files}
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


def fault(folder: epath.Path) -> str | None:
    """What is wrong with the folder; None when every byte of it is as it was written."""
    if not folder.exists():
        return "missing"
    if not finished(folder):
        return "unfinished (it has no manifest)"
    manifest = read(folder)
    if manifest is None:
        return f"damaged ({NAME} is not as it was written)"
    files = manifest["files"]
    try:
        for name, (size, _) in files.items():
            if (length := (folder / name).stat().length) != size:
                return f"damaged ({name} has {length} bytes instead of {size})"
        with ThreadPoolExecutor() as pool:
            digests = pool.map(lambda name: _sha256(folder / name), files)
            changed = [name for name, digest in zip(files, digests, strict=True) if digest != files[name][1]]
    except OSError as error:
        return f"damaged ({error})"
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
        elif name not in (NAME, f"{NAME}.tmp"):
            yield name


def _sha256(path: epath.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _sha256_of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
