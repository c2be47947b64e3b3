"""Data that are tokenised before a run: stores of tokens, and the tokenizer beside them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from gptjax.config import digest, to_json
from gptjax.data.dataset import Dataset
from gptjax.data.shards import Workers, make_store
from gptjax.data.store import Tokens, folder_at
from gptjax.data.tokenizers import LoadTokenizer, Tokenizer, TokenizerConfig, load_tokenizer
from gptjax.protocols import Data, Split
from gptjax.types import UserError


def prepare(
    data: Dataset, tokenizer: Tokenizer, split: Split, out: str | Path, workers: Workers
) -> Iterator[tuple[str, bool]]:
    """Tokenise a split, unless it is there. Yields a line about each store, and False if it waits for other workers.

    out  folder or bucket of the stores"""
    for source in data.mix.sources:
        if split == "validation" and getattr(source, "validation", None) == 0:
            continue
        if isinstance(source, Tokens):
            yield f"{source}, {split}: tokens already", True
            continue
        for encode in data.encodings():
            store = make_store(source, tokenizer, split, out, encode, data.document_type, workers)
            if store is None:
                yield f"{source}, {split}: other workers have shards to make", False
                continue
            size = f"{len(store.offsets) - 1:,} documents of {int(store.offsets[-1]):,} tokens"
            shards = f"{len(store.files):,} shard{'s' if len(store.files) > 1 else ''}"
            yield f"{source}, {split}: {size} in {shards}, {store.place}", True


def tokenizer_of(config: TokenizerConfig, data: Data, tokens: str | Path, keep: bool = False) -> Tokenizer:
    """The tokenizer of a configuration: the one beside the tokens if `prepare` has left it there, else built from the
    training texts of `data`. keep: leave it there.

    Workers and runs must have the same one, and need not train it each."""
    if isinstance(config, LoadTokenizer) or not isinstance(data, Dataset):
        return config.build(data.texts())
    made_from = [to_json(config), [s.fingerprint() for s in data.mix.sources if not isinstance(s, Tokens)]]
    folder = folder_at(tokens, f"tokenizer-{digest(made_from)[:16]}")
    names = folder.names()
    with tempfile.TemporaryDirectory() as here:
        if "complete" in names:
            for name in names:
                (Path(here) / name).write_bytes(folder.read(name))
            try:
                return load_tokenizer(here)
            except UserError as error:
                raise UserError(f"tokens: got {folder.address}, which is damaged ({error}); delete it") from None
        tokenizer = config.build(data.texts())
        if keep:
            tokenizer.save(here)
            for file in sorted(Path(here).iterdir()):
                folder.write(file.name, file.read_bytes())
            folder.write("complete", b"")
    return tokenizer
