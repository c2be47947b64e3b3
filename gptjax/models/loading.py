"""Load models from files:

lm = gptjax.load("runs/quickstart")                      # a run, or a folder of LanguageModel.save
lm = gptjax.load("Qwen/Qwen3-0.6B", dtype="bfloat16")    # a folder for transformers, or a repository of the hub
lm = gptjax.load("stories15M.bin")                       # a llama2.c file
lm = gptjax.load("qwen3-0.6b-q4_k_m.gguf")               # a GGUF file, dequantised
bert = gptjax.load("google-bert/bert-base-uncased", kind=gptjax.EncoderModel)
t5 = gptjax.load("google/flan-t5-small", kind=gptjax.TextToText)

with jax.set_mesh(MeshConfig(tensor=8).make()):          # sharded over eight devices while it is read
    lm = gptjax.load("Qwen/Qwen3-32B")
"""

from __future__ import annotations

import dataclasses
import functools
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.checkpoint.checkpoint import Checkpoints, Restored
from gptjax.config import differences, digest, from_json
from gptjax.data.tokenizers import Tokenizer, has_tokenizer, load_tokenizer
from gptjax.distributed.parameters import declared, flat, nested, parameter_info
from gptjax.distributed.sharding import DEFAULT_RULES, ShardingRules
from gptjax.inference.sampling import Sampling
from gptjax.models.language_model import LanguageModel, loaded_context
from gptjax.models.model import Model
from gptjax.nn import BackboneConfig, LoRA, ModelConfig, TransformerConfig
from gptjax.nn.config import OF_COMPUTATION
from gptjax.protocols import Module, Pretrained
from gptjax.types import FrozenModel, Params, UserError, one_line

M = TypeVar("M", bound=Model)
SETTINGS = (
    *("context", "decoder_start_token_id", "append_eos", "step_separator"),
    *("length", "stride", "question_length"),
)
"""Settings of a saved model, beside its configuration, that are numbers, texts or true or false."""
DTYPES = ("float32", "bfloat16")
Step = int | Literal["latest", "best"]
"""Checkpoint of a stage: the newest, that of the lowest validation loss, or that of a step."""


@overload
def load(
    path: str | Path,
    dtype: str | None = None,
    rules: ShardingRules = DEFAULT_RULES,
    *,
    tokenizer: Tokenizer | str | Path | None = None,
    step: Step = "latest",
) -> LanguageModel: ...
@overload
def load(
    path: str | Path,
    dtype: str | None = None,
    rules: ShardingRules = DEFAULT_RULES,
    *,
    kind: type[M],
    tokenizer: Tokenizer | str | Path | None = None,
    step: Step = "latest",
) -> M: ...
def load(
    path: str | Path,
    dtype: str | None = None,
    rules: ShardingRules = DEFAULT_RULES,
    kind: type[Model] = LanguageModel,
    tokenizer: Tokenizer | str | Path | None = None,
    step: Step = "latest",
) -> Model:
    """Load a model from a folder or a repository of the Hugging Face hub: a folder written by `save`; a run, at a
    checkpoint of its last stage with one; or a folder of `transformers`, of a family in
    `gptjax.interop.families`. A GGUF file works too, and a llama2.c file with its tokenizer beside it.

    dtype      parameter and compute dtype: float32 or bfloat16. None: that of the files
    rules      sharding of the parameters over the current mesh (`jax.set_mesh`), on which the model then runs; devices
               and hosts read their own shards only
    kind       class of the result: `LanguageModel`, `EncoderModel` (BERT), `TextToText` (T5), `ClassifierModel`,
               `RegressorModel` (reward models), `TokenClassifierModel`, or `Model`: any of these
    tokenizer  tokenizer, or the argument of `load_tokenizer`, in place of the path's own. None: the path's own; a model
               of others without one reads and writes ids alone
    step       checkpoint of a run: "latest", "best" (lowest validation loss of those that are kept), or a step

    Raises UserError for anything else, and for files that are damaged or do not match.
    """
    if dtype not in (None, *DTYPES):
        raise UserError(f"dtype: got {dtype!r}, must be {' or '.join(DTYPES)} (default: that of the files)")
    if not (step in ("latest", "best") or (isinstance(step, int) and step >= 0)):
        raise UserError(f"step: got {step!r}, must be latest, best or the number of a step")
    given = tokenizer if tokenizer is None or isinstance(tokenizer, Tokenizer) else load_tokenizer(tokenizer)
    if (file := Path(path).expanduser()).is_file():
        from gptjax.interop.gguf.read import is_gguf

        read = _gguf if is_gguf(file) else _llama2c
        return read(file, dtype, rules, kind, given)
    from gptjax.interop import hub
    from gptjax.io.json_file import check_regular, read_object

    path = hub.folder(path)
    check_regular(path)
    file = path / "config.json"
    if not file.is_file():
        inside = sorted(path.glob("*.gguf"))
        fix = f"load the file {inside[0]}" if inside else "must be a model's folder or a run's"
        raise UserError(f"path: got {path}, which has no config.json; {fix}")
    try:
        config = read_object(file)
    except (OSError, ValueError) as error:
        raise UserError(f"path: got {path}, whose config.json is damaged ({one_line(error)}); restore it") from None
    if step != "latest" and "experiment" not in config:
        raise UserError(f"step: got {step} for {path}, must be latest: only a run has several checkpoints")
    if "experiment" in config:
        from gptjax.models.run import load_run

        model = load_run(path, config["experiment"], dtype, rules, kind, step)
    elif "model" in config and "tokenizer" in config:
        model = _saved(path, config, dtype, rules, kind)
    elif "model_type" in config:
        return _hf(path, dtype, rules, kind, given)
    else:
        raise UserError(f"path: got {path}, whose config.json has an unknown format; give a model's folder or a run's")
    return model if given is None else dataclasses.replace(model, tokenizer=given)


def restore_stage_params(
    checkpoints: Path,
    adapters: Mapping[str, LoRA | None],
    stage: str,
    model: Module,
    abstract: Params | None = None,
    pretrained: Callable[[Params | None], Params] | None = None,
    step: int | None = None,
) -> Restored:
    """Parameters of a run's stage, averaged if it has averages, sharded as the abstract ones. A stage's adapters
    are merged into the parameters of the previous stage, or of the pretrained model.

    checkpoints  folder of the run's checkpoints
    adapters     adapter of each stage, in order
    model        module built by the run's configuration
    pretrained   abstract parameters -> parameters of the pretrained model
    step         None: the newest checkpoint
    """
    lora, names, wanted, base = adapters[stage], list(adapters), abstract, None
    if lora is not None:
        if lora.bits is not None and abstract is not None:  # quantised as in training: from float32
            abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, "float32", sharding=x.sharding), abstract)
        if (before := names.index(stage) - 1) >= 0:
            with Checkpoints(checkpoints / stage) as saved:
                origin = (saved.extra(step) or {}).get("origin") or {}
            base = restore_stage_params(
                checkpoints, adapters, names[before], model, abstract, pretrained, origin.get("step")
            ).state
        else:
            assert pretrained is not None, "a first stage with adapters needs a pretrained model"
            base = pretrained(abstract)
        info = parameter_info(model)
        base = jax.jit(functools.partial(lora.freeze, info=info))(base)
        init = functools.partial(lora.init, info=info)
        abstract = None if abstract is None else jax.eval_shape(init, jax.random.key(0), base)
    with Checkpoints(checkpoints / stage) as saved:
        restored = saved.restore_params(step, ema=True, abstract_params=abstract)
    if lora is None:
        return restored
    merged = jax.jit(lora.merge)(base, restored.state)
    if wanted is not None:
        merged = jax.tree.map(lambda x, want: x.astype(want.dtype), merged, wanted)
    return dataclasses.replace(restored, state=merged)


def init_from_pretrained(path: str | Path, model: Module, tokenizer: Tokenizer, seed: int = 0) -> Params:
    """Initialise a model's parameters, sharded by its rules, from the model in `path`. Parameters that it lacks, such
    as a classifier's head, are initialised from the seed. Raises UserError if architectures or tokenizers differ."""
    found = load(path, "float32", model.rules, kind=Model)
    if found.tokenizer.kind != "missing" and found.tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"tokenizer: got another than that of {path}, must be the same: `load` that, `save` it, "
            "and take both from the folder"
        )
    ours: Any = getattr(model.config, "backbone", model.config)
    theirs: Any = getattr(found.config, "backbone", found.config)
    if type(ours) is type(theirs) and isinstance(ours, BackboneConfig):
        theirs = dataclasses.replace(theirs, **{name: getattr(ours, name) for name in OF_COMPUTATION})
    if other := differences(theirs, ours):
        raise UserError(f"model: differs from the pretrained model {path}: {'; '.join(other)}")
    pretrained, initialiser = flat(found.params), model.clone(rules=model.rules.for_batch_size(1))

    def init_missing() -> dict[str, jax.Array]:
        new = initialiser.init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))["params"]
        return {name: leaf for name, leaf in flat(new).items() if name not in pretrained}

    kept = {name: pretrained[name] for name in declared(model) if name in pretrained}
    return nested(kept | jax.jit(init_missing)())


def model_class(config: type[ModelConfig]) -> type[Model]:
    """Wrapper class (`LanguageModel`, ...) for this config."""
    if config is TransformerConfig:
        return LanguageModel  # without importing the others
    from gptjax.models.classifier_model import ClassifierModel
    from gptjax.models.embedder_model import EmbedderModel
    from gptjax.models.encoder_model import EncoderModel
    from gptjax.models.regressor_model import RegressorModel
    from gptjax.models.span_extractor_model import SpanExtractorModel
    from gptjax.models.text_to_text import TextToText
    from gptjax.models.token_classifier_model import TokenClassifierModel
    from gptjax.nn import (
        ClassifierConfig,
        EmbedderConfig,
        EncoderConfig,
        EncoderDecoderConfig,
        RegressorConfig,
        SpanExtractorConfig,
        TokenClassifierConfig,
    )

    kinds = {
        ClassifierConfig: ClassifierModel,
        EmbedderConfig: EmbedderModel,
        EncoderConfig: EncoderModel,
        EncoderDecoderConfig: TextToText,
        RegressorConfig: RegressorModel,
        SpanExtractorConfig: SpanExtractorModel,
        TokenClassifierConfig: TokenClassifierModel,
    }
    return next((cls for base, cls in kinds.items() if issubclass(config, base)), LanguageModel)


def checked_class(kind: type[Model], config: type[ModelConfig], path: Path) -> type[Model]:
    """Wrapper class for this config, checked against the requested `kind` before parameters are read."""
    found = model_class(config)
    if not issubclass(found, kind):
        raise UserError(
            f"kind: got {kind.__name__}, must be {found.__name__} for the model in {path}: "
            f"gptjax.load(path, kind=gptjax.{found.__name__})"
        )
    return found


def _hf(
    path: Path, dtype: str | None, rules: ShardingRules, kind: type[Model], given: Tokenizer | None = None
) -> Model:
    from gptjax.interop import huggingface, tokenizers

    found = checked_class(kind, huggingface.read_kind(path), path)
    config, params = huggingface.load_hf(path, dtype, rules)
    tokenizer = tokenizers.load(path, config.vocab) if given is None else given
    return found(config, params, tokenizer, rules=rules, **found.settings_of_hf(path, config, tokenizer))


def _gguf(file: Path, dtype: str | None, rules: ShardingRules, kind: type[Model], given: Tokenizer | None) -> Model:
    from gptjax.interop import huggingface
    from gptjax.interop.gguf.read import read

    checked_class(kind, TransformerConfig, file)
    fields, tensors, text = read(file)
    config, params = huggingface.from_tensors(fields, tensors, dtype, rules)
    assert isinstance(config, TransformerConfig)
    context = loaded_context(config, config.max_positions or fields["max_position_embeddings"])
    tokenizer = text.tokenizer if given is None else given
    return LanguageModel(config, params, tokenizer, context, text.template, text.stop_token_ids, rules=rules)


def _llama2c(file: Path, dtype: str | None, rules: ShardingRules, kind: type[Model], given: Tokenizer | None) -> Model:
    from gptjax.data.tokenizers import MissingTokenizer
    from gptjax.interop import huggingface, llama2c

    checked_class(kind, TransformerConfig, file)
    fields, tensors = llama2c.read(file)
    config, params = huggingface.from_tensors(fields, tensors, dtype, rules)
    context = fields.get("max_position_embeddings")
    there = load_tokenizer(file.parent) if given is None and has_tokenizer(file.parent) else given
    tokenizer = MissingTokenizer(b"", {}, config.vocab) if there is None else there
    return LanguageModel(config, params, tokenizer, context, rules=rules)


def _saved(path: Path, config: dict[str, Any], dtype: str | None, rules: ShardingRules, kind: type[Model]) -> Model:
    from gptjax.inference.quantise import from_arrays
    from gptjax.interop import safetensors
    from gptjax.interop.templates import ChatTemplate
    from gptjax.train.stage import QAT

    if config.pop("sha256", None) != digest(config):
        raise UserError(f"path: got {path}, whose config.json is not as it was saved; restore it")
    model = model_config(config["model"], dtype)
    found = checked_class(kind, type(model), path)
    tokenizer = trained_tokenizer(path, config["tokenizer"])
    abstract = declared(model.build(rules))

    def place(name: str, values: np.ndarray) -> jax.Array:
        matches = name in abstract and abstract[name].shape == values.shape  # otherwise the model's own check raises
        sharding = abstract[name].sharding if matches else None
        own = dtype if dtype and values.dtype == np.float32 and name in abstract else values.dtype
        leaf = jax.ShapeDtypeStruct(values.shape, own, sharding=sharding)
        return safetensors.place(leaf, lambda _: values)

    try:
        # Opened here: of a damaged file numpy leaves it open.
        with open(path / "params.npz", "rb") as opened, np.load(opened, allow_pickle=False) as file:
            params = from_arrays(model, {name: place(name, file[name]) for name in file.files}, rules)
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"path: got {path}, whose params.npz is missing or damaged ({error}); restore it") from None
    settings = {name: config[name] for name in SETTINGS if name in config}
    if config.get("template") is not None:
        settings["template"] = ChatTemplate(**config["template"])
    if config.get("sampling") is not None:
        settings["sampling"] = Sampling(**config["sampling"])
    if config.get("quantisation") is not None:
        settings["quantisation"] = QAT(**config["quantisation"])
    settings |= {name: tuple(config[name]) for name in ("stop_token_ids", "labels") if config.get(name) is not None}
    return found(model, nested(params), tokenizer, rules=rules, **settings)


def model_config(config: Any, dtype: str | None) -> ModelConfig:
    model: ModelConfig = from_json(config)
    return model if dtype is None else model.with_dtype(dtype)


def trained_tokenizer(path: Path, fingerprint: str) -> Tokenizer:
    tokenizer = load_tokenizer(path / "tokenizer")
    if tokenizer.fingerprint != fingerprint:
        raise UserError(
            f"path: got {path}, whose tokenizer is not the one the model was trained with; restore that one"
        )
    return tokenizer


def check_frozen(model: Pretrained, tokenizer: Tokenizer) -> None:
    """Raise UserError if the model has another tokenizer than this one. Its weights are not read."""
    from gptjax.interop import hub

    if Path(model.path).expanduser().is_file():
        return  # a file's tokenizer is read with the model
    folder = hub.folder(model.path)
    folder = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
    if has_tokenizer(folder):
        _check_same_tokenizer(model, load_tokenizer(folder), tokenizer)


def load_frozen(model: Pretrained, tokenizer: Tokenizer, rules: ShardingRules) -> FrozenModel:
    """The model, sharded over the current mesh. Raises UserError if its tokenizer is another or it predicts no next
    token."""
    loaded = load(model.path, model.dtype, rules)
    _check_same_tokenizer(model, loaded.tokenizer, tokenizer)
    if model.bits is not None:
        loaded = loaded.quantised(bits=model.bits)
    return FrozenModel(loaded.params, loaded.config.build(rules))


def _check_same_tokenizer(model: Pretrained, found: Any, tokenizer: Tokenizer) -> None:
    if found.kind != "missing" and found.fingerprint != tokenizer.fingerprint:
        raise UserError(f"path: got {model.path}, whose tokenizer is not the run's; load or train both with one")
