"""`gptjax quantize`: write a model with quantised weights, and report what that costs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from gptjax.cli.convert import exportable

# Nothing heavier up here: --help must not wait for jax.
if TYPE_CHECKING:
    from gptjax.models.language_model import LanguageModel

GROUPS = (128, 64, 32, 16)
"""Inputs per scale with 4 bits, the first that divides the inputs of every matrix."""
TOKENS = 64
"""Tokens of a timed text."""
REPORT = "quantization.md"


def quantize(
    path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")],
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    bits: Literal[8, 4] | None = None,
    group: int | None = None,
    method: Literal["round", "gptq"] = "round",
    calibration: str | None = None,
    calibration_tokens: int = 16_384,
    text: str | None = None,
    to: Literal["hf", "gptjax"] = "hf",
    step: int | Literal["latest", "best"] = "latest",
) -> None:
    """Write a model with quantised weights, and a report: size, bits per byte, tokens per second, worst layers.

    Args:
        path: Model to load: a run, a folder, a name on the Hugging Face hub, or a GGUF file.
        out: Folder to write; it must not exist.
        bits: Size of a weight. None: 8; of a run whose last stage trained for it (`Stage.quantisation`) that stage's.
        group: Inputs per scale. None: with 8 bits all inputs of an output; with 4 bits 128, or the largest of 64, 32
            and 16 that divides the inputs of every matrix; of a run whose last stage trained for it that stage's.
        method: round: to the nearest. gptq: corrects each rounding in the weights that follow, with a calibration text.
        calibration: Text file for gptq. None: the training split of the run's evaluation of bits per byte.
        calibration_tokens: Number of tokens of the calibration text to use.
        text: Text file to measure bits per byte on. None: the run's evaluation of bits per byte.
        to: Format. hf: compressed-tensors, for gptjax, transformers and vLLM; embeddings and head stay floats.
            gptjax: a folder of ours, with 8-bit embeddings and head.
        step: Checkpoint of a run: latest, best (lowest validation loss), or a step.
    """
    import dataclasses

    from gptjax.inference.quantise import gptq_params, quantise_params
    from gptjax.models.loading import load
    from gptjax.types import UserError

    if out.exists():
        raise UserError(f"out: got {out}, which exists already; choose another or delete it")
    if method == "round" and calibration is not None:
        raise UserError(f"calibration: got {calibration}, must not be given for the method round; use --method gptq")
    lm = exportable(load(path, step=step), to)
    evaluation = evaluation_of(lm, path, text)
    embeddings = to == "gptjax"
    if (trained := lm.quantisation) is not None:
        trained.check_rounding(bits=bits, group=group, method=method)
        bits, group, embeddings = trained.bits, trained.group, embeddings and trained.embeddings
    else:
        bits = bits or 8
        group = group or (None if bits == 8 else _group(lm))
    settings = {"bits": bits, "group": group, "embeddings": embeddings, "progress": lambda name: print(name)}
    if method == "gptq":
        tokens = _tokens(lm, evaluation, calibration, calibration_tokens)
        params = gptq_params(lm.config, lm.params, tokens, **settings)
    else:
        params = quantise_params(lm.config, lm.params, **settings)
    small = dataclasses.replace(lm, params=params, quantisation=None)
    if to == "hf":
        small.save_hf(out)
    else:
        small.save(out)
    scheme = f"{bits} bits, {f'a scale per {group} inputs' if group else 'a scale per output'}, method {method}"
    report = f"# {Path(path).name}: {scheme}\n\n" + _report(lm, load(out), evaluation)
    (out / REPORT).write_text(report)
    print(f"\n{report}\n{out} is written, with this report in {REPORT}")


def evaluation_of(lm: LanguageModel, path: str, text: str | None) -> Any:
    """The evaluation of bits per byte. None: there is neither a text nor a run's evaluation. Raises UserError for a
    text that cannot be read."""
    import json

    from gptjax.config import from_json
    from gptjax.data import Text
    from gptjax.evals import BitsPerByte

    if text is not None:
        evaluation = BitsPerByte(Text(text, validation=0.0), split="train", length=lm.context or 256)
        evaluation.check(lm.tokenizer)
        return evaluation
    file = Path(path) / "config.json"
    experiment = json.loads(file.read_text()).get("experiment") if file.is_file() else None
    stages = experiment["stages"].values() if experiment else ()
    found = [from_json(evaluation) for stage in stages for evaluation in stage["evaluations"]]
    return next((evaluation for evaluation in reversed(found) if isinstance(evaluation, BitsPerByte)), None)


def _group(lm: LanguageModel) -> int:
    """Inputs per scale that divide the inputs of every matrix."""
    from gptjax.distributed.parameters import flat, parameter_info
    from gptjax.types import UserError

    sizes = {info.fan[0] for info in flat(parameter_info(lm.config.build())).values() if info.is_matrix}
    for group in GROUPS:
        if all(size % group == 0 for size in sizes):
            return group
    raise UserError(
        f"group: got none, and none of {', '.join(map(str, GROUPS))} divides the inputs of every matrix, "
        f"{', '.join(map(str, sorted(sizes)))}; give one with --group"
    )


def _tokens(lm: LanguageModel, evaluation: Any, file: str | None, count: int) -> Any:
    """Sequences of a calibration text, int32 [B, T]."""
    import numpy as np

    from gptjax.data import Text
    from gptjax.types import UserError

    def documents() -> Iterator[str]:
        if file is not None:
            return iter(Text(file, validation=0.0).documents("train"))
        if evaluation is None or evaluation.split == "train":
            raise UserError("calibration: got none, must be a text file for the method gptq")
        return iter(evaluation.source.documents("train"))

    ids: list[int] = []
    for document in documents():
        ids += lm.encode_prompt(document) if document else []
        if len(ids) >= count:
            break
    length = min(lm.context or 256, lm.config.max_positions or 256, 256, max(len(ids), 1))
    rows = min(len(ids), count) // length
    if rows < 1:
        raise UserError(f"calibration: got {len(ids)} tokens, must be at least one; give a longer text")
    return np.asarray(ids[: rows * length], np.int32).reshape(rows, length)


def _report(lm: LanguageModel, small: LanguageModel, evaluation: Any) -> str:
    """A table of both models, and the matrices with the largest errors."""
    from gptjax.inference.quantise import errors

    models = {"float": lm, "quantised": small}
    size = {name: sum(x.nbytes for x in _leaves(model)) / 1e6 for name, model in models.items()}
    bits = {
        name: f"{evaluation(model).values['bits_per_byte']:.4f}" if evaluation else "no text"
        for name, model in models.items()
    }
    speed = dict.fromkeys(models, 0.0)
    for turn in range(4):  # the first one compiles
        for name, model in models.items():
            rate = _rate(model)
            speed[name] = max(speed[name], rate) if turn else 0.0
    lines = ["| weights | MB in memory | bits per byte | tokens per second |", "|---|---|---|---|"]
    lines += [f"| {name} | {size[name]:,.1f} | {bits[name]} | {speed[name]:,.1f} |" for name in models]
    worst = sorted(errors(lm.config, lm.params, small.params).items(), key=lambda item: -item[1])[:5]
    lines += ["", "Largest relative errors of a matrix, |W - Q| / |W|:", "", "| matrix | error |", "|---|---|"]
    lines += [f"| {name} | {error:.4f} |" for name, error in worst]
    return "\n".join(lines) + "\n"


def _leaves(model: LanguageModel) -> list[Any]:
    from gptjax.distributed.parameters import flat

    return list(flat(model.params).values())


def _rate(model: LanguageModel) -> float:
    """Tokens per second of one text."""
    from gptjax.inference import Sampling
    from gptjax.inference.generate import generate

    count = min(TOKENS, (model.config.max_positions or 2 * TOKENS) - 2)
    start = time.perf_counter()
    generate(
        model.config.build(model.rules),
        model._decode_params,
        model.tokenizer,
        [[0]],
        count,
        Sampling(temperature=0),
        stop_token_ids=(),
    )
    return count / (time.perf_counter() - start)
