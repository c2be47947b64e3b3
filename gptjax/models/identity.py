"""Identity of a model on disk, by its content: the same wherever its folder is."""

from __future__ import annotations

from pathlib import Path

from gptjax.checkpoint.checkpoint import Checkpoints
from gptjax.config import digest
from gptjax.data.files import file_digest

READ = (".safetensors", ".npz", ".bin", ".json", ".model", ".txt", ".jinja")
"""Suffixes of the files that a model is loaded from."""


def content_digest(path: str | Path) -> str:
    """SHA-256, in hex, of the model that `gptjax.load(path)` reads: of a run, the manifest of its newest checkpoint; of
    another folder or file, its files (the larger ones in blocks, as `file_digest` reads them). Raises UserError if
    there is none."""
    from gptjax.interop import hub

    file = Path(path).expanduser()
    if file.is_file():
        return file_digest(file)
    folder = hub.folder(path)
    if (folder / "checkpoints").is_dir():
        return digest(_newest(folder))
    files = sorted(found for found in folder.rglob("*") if found.is_file() and found.suffix in READ)
    return digest({str(found.relative_to(folder)): file_digest(found) for found in files})


def _newest(run: Path) -> list[object]:
    """Files of each stage's newest checkpoint, with their digests, and what it was trained from."""
    found: list[object] = []
    for folder in sorted((run / "checkpoints").iterdir()):
        with Checkpoints(folder) as checkpoints:
            content = checkpoints.content() or {}
        extra = content.get("extra") or {}
        found.append([folder.name, content.get("files"), extra.get("tokenizer"), extra.get("origin")])
    return found
