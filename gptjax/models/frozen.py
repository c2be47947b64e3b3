"""The models that a stage reads and does not train, from the paths in its objective."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gptjax.data.tokenizers import Tokenizer, has_tokenizer, load_tokenizer
from gptjax.distributed.sharding import ShardingRules
from gptjax.models.loading import load
from gptjax.protocols import Pretrained
from gptjax.types import FrozenModel, UserError


def check_tokenizer(model: Pretrained, tokenizer: Tokenizer) -> None:
    """Raise UserError if the model has another tokenizer than this one. Its weights are not read."""
    from gptjax.interop import hub

    if Path(model.path).expanduser().is_file():
        return  # a file's tokenizer is read with the model
    folder = hub.folder(model.path)
    folder = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
    if has_tokenizer(folder):
        _check_same(model, load_tokenizer(folder), tokenizer)


def load_frozen(model: Pretrained, tokenizer: Tokenizer, rules: ShardingRules) -> FrozenModel:
    """The model, sharded over the current mesh. Raises UserError if its tokenizer is another or it predicts no next
    token."""
    loaded = load(model.path, model.dtype, rules)
    _check_same(model, loaded.tokenizer, tokenizer)
    if model.bits is not None:
        loaded = loaded.quantised(bits=model.bits)
    return FrozenModel(loaded.params, loaded.config.build(rules))


def _check_same(model: Pretrained, found: Any, tokenizer: Tokenizer) -> None:
    if found.kind != "missing" and found.fingerprint != tokenizer.fingerprint:
        raise UserError(f"path: got {model.path}, whose tokenizer is not the run's; load or train both with one")
