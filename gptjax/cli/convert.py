"""From one program's files to another's: what `gptjax convert` runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

# Nothing heavier up here: --help must not wait for jax.


def convert(
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")],
    destination: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DESTINATION")],
    to: Literal["hf", "gguf", "gptjax"] = "hf",
    dtype: str | None = None,
    adapter: Path | None = None,
) -> None:
    """Write a model in another form: a folder for transformers, a GGUF file for llama.cpp, or a folder of ours.

    Args:
        source: What gptjax.load takes: a folder, a name on the Hugging Face hub, a llama2.c file.
        destination: What to write; it must not exist.
        to: The form.
        dtype: Of the weights: for hf float32 (unless told), bfloat16 or float16; for gguf f32, f16 (unless told), bf16
            or q8_0.
        adapter: A folder of PEFT's, to be merged into the model.
    """
    from gptjax.models.language_model import LanguageModel
    from gptjax.models.loading import load
    from gptjax.models.model import Model
    from gptjax.nn import count
    from gptjax.types import UserError

    if destination.exists():
        raise UserError(f"destination: got {destination}, which exists already; choose another or delete it")
    if to == "gptjax" and dtype is not None:
        raise UserError(f"dtype: got {dtype}, must be none: our folders hold float32")
    model = load(source, kind=Model)
    if adapter is not None:
        if not isinstance(model, LanguageModel):
            raise UserError(f"adapter: got one for a {type(model).__name__}, must be none: only decoders take them")
        model = model.with_adapter(adapter)
    if to == "hf":
        model.save_hf(destination, dtype or "float32")
    elif to == "gguf":
        if not isinstance(model, LanguageModel):
            raise UserError(f"to: got gguf for a {type(model).__name__}, must be hf or gptjax: only decoders go there")
        model.save_gguf(destination, dtype or "f16")
    else:
        model.save(destination)
    print(f"{count(model.params):,} parameters in {destination}")
