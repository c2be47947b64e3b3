"""`gptjax prune`: write a model without its smallest weights, and report what that costs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from gptjax.cli.convert import exportable
from gptjax.cli.quantize import evaluation_of

REPORT = "pruning.md"


def prune(
    path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")],
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    fraction: float | None = None,
    pattern: str | None = None,
    text: str | None = None,
    to: Literal["hf", "gptjax"] = "gptjax",
    step: int | Literal["latest", "best"] = "latest",
) -> None:
    """Write a model with the smallest weights of each matrix set to 0, and a report. To recover, train the result on
    with optim.KeepZeros.

    Args:
        path: Model to load: a run, a folder, a name on the Hugging Face hub, or a GGUF file.
        out: Folder to write; it must not exist.
        fraction: Part of each matrix that becomes 0.
        pattern: n:m, such as 2:4: of every m neighbouring inputs of an output the n largest stay.
        text: Text file to measure bits per byte on. None: the run's evaluation of bits per byte.
        to: Format. gptjax: a folder of ours. hf: for transformers and others.
        step: Checkpoint of a run: latest, best (lowest validation loss), or a step.
    """
    import dataclasses

    from gptjax.inference.pruning import prune_params, zeros
    from gptjax.models.language_model import LanguageModel
    from gptjax.models.loading import load
    from gptjax.types import UserError

    if out.exists():
        raise UserError(f"out: got {out}, which exists already; choose another or delete it")
    n, colon, m = (pattern or "").partition(":")
    if pattern is not None and not (colon and n.isdecimal() and m.isdecimal()):
        raise UserError(f"pattern: got {pattern}, must be n:m, such as 2:4")
    lm = load(path, step=step)
    if not isinstance(lm, LanguageModel):
        raise UserError(f"path: got {path}, a {type(lm).__name__}, must be a language model")
    lm, measure = exportable(lm, to), evaluation_of(lm, path, text)
    params = prune_params(lm.config, lm.params, fraction, (int(n), int(m)) if pattern else None)
    small = dataclasses.replace(lm, params=params)
    small.save_hf(out) if to == "hf" else small.save(out)
    again = load(out)
    lines = [f"# {Path(path).name}: {pattern or fraction} pruned", ""]
    lines += ["| weights | zeros in matrices | bits per byte |", "|---|---|---|"]
    for name, model in (("before", lm), ("pruned", again)):
        bits = f"{measure(model).values['bits_per_byte']:.4f}" if measure else "no text"
        lines.append(f"| {name} | {zeros(model.config, model.params):.1%} | {bits} |")
    report = "\n".join(lines) + "\n"
    (out / REPORT).write_text(report)
    print(f"{report}\n{out} is written, with this report in {REPORT}")
