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
    from gptjax.distributed.sharding import MeshConfig, ShardingRules
    from gptjax.experiment.experiment import Experiment, Stage
    from gptjax.experiment.report import Expect
    from gptjax.inference.sampling import Sampling
    from gptjax.models.classifier_model import ClassifierModel
    from gptjax.models.embedder_model import EmbedderModel
    from gptjax.models.encoder_model import EncoderModel
    from gptjax.models.language_model import LanguageModel
    from gptjax.models.loading import load
    from gptjax.models.model import Model
    from gptjax.models.regressor_model import RegressorModel
    from gptjax.models.span_extractor_model import SpanExtractorModel
    from gptjax.models.text_to_text import TextToText
    from gptjax.models.token_classifier_model import TokenClassifierModel
    from gptjax.types import UserError

__version__ = "0.1.0"
__all__ = [
    "ClassifierModel",
    "EmbedderModel",
    "EncoderModel",
    "Expect",
    "Experiment",
    "LanguageModel",
    "MeshConfig",
    "Message",
    "Model",
    "RegressorModel",
    "Sampling",
    "ShardingRules",
    "SpanExtractorModel",
    "Stage",
    "TextToText",
    "TokenClassifierModel",
    "UserError",
    "load",
]

_HOME = {
    "ClassifierModel": "gptjax.models.classifier_model",
    "EmbedderModel": "gptjax.models.embedder_model",
    "EncoderModel": "gptjax.models.encoder_model",
    "Expect": "gptjax.experiment.report",
    "Experiment": "gptjax.experiment.experiment",
    "LanguageModel": "gptjax.models.language_model",
    "MeshConfig": "gptjax.distributed.sharding",
    "Message": "gptjax.data.chat",
    "Model": "gptjax.models.model",
    "RegressorModel": "gptjax.models.regressor_model",
    "ShardingRules": "gptjax.distributed.sharding",
    "SpanExtractorModel": "gptjax.models.span_extractor_model",
    "Sampling": "gptjax.inference.sampling",
    "Stage": "gptjax.experiment.experiment",
    "TextToText": "gptjax.models.text_to_text",
    "TokenClassifierModel": "gptjax.models.token_classifier_model",
    "UserError": "gptjax.types",
    "load": "gptjax.models.loading",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'gptjax' has no attribute {name!r}")
