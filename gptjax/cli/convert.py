"""`gptjax convert`: write a model in another format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

# Nothing heavier up here: --help must not wait for jax.


def exportable(model: Any, to: str) -> Any:
    """The model as a file of this format can hold it: without extra heads, which is printed. Raises UserError for one
    that it cannot hold."""
    from gptjax.interop.huggingface import expressing
    from gptjax.models.language_model import LanguageModel

    if to == "gptjax":
        return model
    if isinstance(model, LanguageModel) and (ahead := getattr(model.config, "ahead", 0)):
        print(f"without its extra heads ({ahead}), which {to} does not have")
        model = model.without_extra_heads()
    expressing(model.config)
    return model


def convert(
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")],
    destination: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DESTINATION")],
    to: Literal["hf", "gguf", "gptjax"] = "hf",
    dtype: str | None = None,
    adapter: Path | None = None,
    tokenizer: str | None = None,
    step: int | Literal["latest", "best"] = "latest",
) -> None:
    """Write a model in another format: a folder for transformers, a GGUF file for llama.cpp, or a folder of ours.

    Args:
        source: Model to load: a folder, a name on the Hugging Face hub, a GGUF file, or a llama2.c file.
        destination: Folder or file to write; it must not exist.
        to: Format.
        dtype: Dtype of the weights. hf: float32 (default), bfloat16 or float16. gguf: f32, f16 (default), bf16, q8_0 or
            q4_0.
        adapter: Folder of a PEFT adapter to merge into the model.
        tokenizer: Folder or file of a tokenizer, in place of the source's own.
        step: Checkpoint of a run: latest, best (lowest validation loss), or a step.
    """
    from gptjax.models.language_model import LanguageModel
    from gptjax.models.loading import load
    from gptjax.models.model import Model
    from gptjax.nn import count
    from gptjax.types import UserError

    if destination.exists():
        raise UserError(f"destination: got {destination}, which exists already; choose another or delete it")
    if to == "gptjax" and dtype is not None:
        raise UserError(f"dtype: got {dtype}, must not be given: our folders hold float32")
    model = load(source, kind=Model, tokenizer=tokenizer, step=step)
    if adapter is not None:
        if not isinstance(model, LanguageModel):
            raise UserError(
                f"adapter: got one for a {type(model).__name__}, must not be given: only decoders take them"
            )
        model = model.with_adapter(adapter)
    if to == "gguf" and not isinstance(model, LanguageModel):
        raise UserError(
            f"to: got gguf for a {type(model).__name__}, must be hf or gptjax: GGUF files hold only decoders"
        )
    model = exportable(model, to)
    if to == "hf":
        model.save_hf(destination, dtype or "float32")
    elif to == "gguf":
        model.save_gguf(destination, dtype or "f16")
    else:
        model.save(destination)
    print(f"{count(model.params):,} parameters in {destination}")
