"""gptjax: build a ChatGPT-like system yourself, from raw text to a chat model, in JAX and Flax.

import gptjax

lm = gptjax.load("runs/quickstart")
print(lm.chat([{"role": "user", "content": "What does textwrap.dedent do?"}]).content)

The rooms: `nn` (modules), `data`, `optim`, `objectives`, `train`, `inference`, `evals`. Names here are imported when
they are first used, so that `import gptjax` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptjax.data.chat import Message
    from gptjax.experiment import Experiment, Stage
    from gptjax.inference.sampling import Sampling
    from gptjax.language_model import LanguageModel
    from gptjax.loading import load
    from gptjax.sharding import Mesh, Rules
    from gptjax.types import UserError

__version__ = "0.1.0"
__all__ = ["Experiment", "LanguageModel", "Mesh", "Message", "Rules", "Sampling", "Stage", "UserError", "load"]

_HOME = {
    "Experiment": "gptjax.experiment",
    "LanguageModel": "gptjax.language_model",
    "Mesh": "gptjax.sharding",
    "Message": "gptjax.data.chat",
    "Rules": "gptjax.sharding",
    "Sampling": "gptjax.inference.sampling",
    "Stage": "gptjax.experiment",
    "UserError": "gptjax.types",
    "load": "gptjax.loading",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'gptjax' has no attribute {name!r}")
