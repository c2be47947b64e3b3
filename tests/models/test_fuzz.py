"""Damaged folders and mistaken command lines, drawn by a seed: each is read, or refused in one line."""

import dataclasses
import json
import os
import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from gptjax import Experiment, Stage, data, optim
from gptjax.cli import run as launcher
from gptjax.data import TrainSentencePiece
from gptjax.distributed.parameters import declared, nested, parameter_info
from gptjax.interop import heads, huggingface, peft
from gptjax.interop.huggingface import save_hf, to_tensors
from gptjax.interop.safetensors import write
from gptjax.models.loading import load
from gptjax.models.model import Model
from gptjax.nn import (
    GELU,
    LayerNorm,
    LayerOverrides,
    LearnedPositions,
    LoRA,
    MixtureOfExperts,
    MultiHeadAttention,
    Parallel,
    Positions,
    RoPE,
    ScaledPreNorm,
    TransformerConfig,
    YaRN,
)
from gptjax.objectives import NextToken
from gptjax.types import UserError

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 7, 10**6, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "x", "5", "None", "\0", "\ud800", "é" * 999, [], [None], [1], ["x"], [[]], {}, {"x": 1}, {"content": 5}),
)
"""Put in the place of any value of a JSON file."""
CONTENTS = (
    b"",
    b"{",
    b"[]",
    b"null",
    b"5",
    b"\xff\xfe{\x00}\x00",
    b"[" * 10**5,
    b'{"a":' * 10**5,
    b'{"a": 1' + b"0" * 5_000 + b"}",
)
"""Put in the place of any file."""
MANY = range(1_000, 1_600)
"""Seeds of the slow tests: about a minute each. Others find new faults: a change of this range is how to look."""


def random_params(config: Any) -> Any:
    rng = np.random.default_rng(0)
    found = {name: np.asarray(rng.normal(0, 0.3, x.shape), np.float32) for name, x in declared(config.build()).items()}
    return nested(found)


def run_folder(folder: Path) -> None:
    """A run of two stages, the second of adapters."""
    text = folder.with_suffix(".txt")
    text.write_text("\n".join(f"a few words, {i}" for i in range(99)))
    source = data.Text(str(text), "\n", validation=0.5)
    optimizer = optim.AdamW()
    made = data.Pretrain(source, length=16, batch=8)
    base = Stage(made, NextToken(), optimizer, steps=1, prompts=(), eval_sequences=8)
    stages = {"base": base, "adapt": dataclasses.replace(base, adapter=LoRA(rank=2, match=("q",)))}
    config = TransformerConfig(vocab=264, layers=1, width=16, heads=2)
    Experiment(config, data.Bytes(), stages).run(folder)
    text.unlink()
    shutil.rmtree(folder / "tensorboard")


def read(folder: Path) -> None:
    """Load what a folder holds."""
    if folder.name.startswith("adapter"):
        load(folder.parent / "base").with_adapter(folder)
    else:
        load(folder, kind=Model)


SIZES: Any = {"vocab": 300, "layers": 2, "width": 16, "heads": 2}
MODELS = {
    "gpt2": TransformerConfig(
        **SIZES, positions=LearnedPositions(32), norm=LayerNorm(1e-5), mlp=GELU(), bias=True, tie_embeddings=True
    ),
    "llama": TransformerConfig(**SIZES, positions=RoPE(scaling=YaRN(factor=4.0, original_length=32))),
    "mixtral": TransformerConfig(**SIZES, mlp=MixtureOfExperts(experts=4)),
    "smollm3": TransformerConfig(**SIZES, pattern=(LayerOverrides(window=5, positions=Positions()), LayerOverrides())),
    "granite": TransformerConfig(**SIZES, residual=ScaledPreNorm(0.5), logit_scale=0.25),
    "cohere2": TransformerConfig(
        **SIZES,
        positions=RoPE(interleaved=True),
        norm=LayerNorm(bias=False),
        residual=Parallel(shared=True),
        pattern=(LayerOverrides(window=5), LayerOverrides(positions=Positions())),
    ),
    "stablelm": TransformerConfig(
        **SIZES,
        positions=RoPE(fraction=0.5),
        norm=LayerNorm(),
        residual=Parallel(shared=True),
        attention=MultiHeadAttention(bias=True, output_bias=False, qk_norm=LayerNorm(bias=False, per_head=True)),
    ),
}
OTHERS: dict[str, dict[str, Any]] = {
    "bert": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 32,
        "layer_norm_eps": 1e-12,
        "type_vocab_size": 2,
        "hidden_act": "gelu",
    },
    "t5": {
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 2,
        "num_heads": 2,
        "decoder_start_token_id": 0,
        "relative_attention_num_buckets": 8,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "relu",
        "tie_word_embeddings": True,
    },
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """Good folders: of `transformers`, with several files of weights too, and our own."""
    place = tmp_path_factory.mktemp("good")
    texts = ["a few words of text, and more of them"] * 20
    tokenizer = TrainSentencePiece(300).build(iter(texts))
    for name, config in MODELS.items():
        params = random_params(config)
        save_hf(place / name, config, params, tokenizer, context=64, model_type=name)
        (place / name / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|end|>"}}')
    config = MODELS["llama"]
    shutil.copytree(place / "llama", place / "shards")
    (place / "shards" / "model.safetensors").unlink()
    _, tensors = to_tensors(config, random_params(config))
    write(place / "shards", tensors.shapes, tensors.__getitem__, max_shard=20_000)
    load(place / "llama").save(place / "ours")
    for name, fields in OTHERS.items():
        config = heads.read(huggingface._family(name), {"model_type": name, "vocab_size": 300, **fields})
        save_hf(place / name, config, random_params(config), tokenizer, model_type=name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPTJAX_CACHE", str(place.with_name("cache")))
        run_folder(place / "run")
    (place / "adapters").mkdir()
    lora, whole = LoRA(rank=2, match=("q", "v")), load(place / "llama")
    shutil.copytree(place / "llama", place / "adapters" / "base")
    info = parameter_info(whole.config.build())
    peft.write(place / "adapters" / "adapter", lora, lora.init(jax.random.key(0), whole.params, info), whole.config)
    found = [*sorted(folder for folder in place.iterdir() if folder.name != "adapters"), place / "adapters" / "adapter"]
    for folder in found:
        read(folder)
    return found


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The path of every value inside a JSON value; of long lists and objects, of a few."""
    inside = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    return [p for key, item in inside[:60] for p in [(*path, key), *places(item, (*path, key))]]


def damage(folder: Path, rng: random.Random) -> str:
    """Damage one file of a folder. Returns what was done."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    file = rng.choice([path for path in files if path.suffix == ".json"] * 3 + files)
    data, kind = file.read_bytes(), rng.choice(("field", "field", "field", "field", "content", "cut", "bit", "special"))
    if kind == "field" and file.suffix == ".json":
        content = json.loads(data)
        place = rng.choice(places(content))
        *inside, last = place
        holder = content
        for key in inside:
            holder = holder[key]
        value = rng.choice((*VALUES, del_ := object()))
        if value is del_:
            del holder[last]
        else:
            holder[last] = value
        file.write_text(json.dumps(content))
        return f"{file.name}: {place} = {'nothing' if value is del_ else repr(value)[:60]}"
    if kind == "special":
        file.unlink()
        made = rng.choice(("fifo", "folder", "link to itself", "nothing"))
        if made == "fifo":
            os.mkfifo(file)
        elif made == "folder":
            file.mkdir()
        elif made == "link to itself":
            file.symlink_to(file)
        return f"{file.name}: {made}"
    changed = bytearray(data)
    if kind == "bit" and data:
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del changed[rng.randrange(len(data) + 1) :]
    else:
        kind, changed = "content", bytearray(rng.choice(CONTENTS))
    file.write_bytes(changed)
    return f"{file.name}: {kind}"


def check_folder(folders: list[Path], seed: int, place: Path) -> None:
    rng = random.Random(seed)
    good = rng.choice(folders)
    folder = place / f"{good.name}-{seed}"
    shutil.copytree(good, folder)
    if good.name == "adapter" and not (place / "base").exists():
        shutil.copytree(good.parent / "base", place / "base")
    done = damage(folder, rng)
    message = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(folder)
    except UserError as error:
        message = str(error)
    except BaseException as error:
        raise AssertionError(f"seed {seed}, {good.name}, {done}: {type(error).__name__}: {str(error)[:300]}") from error
    finally:
        shutil.rmtree(folder)
    assert "\n" not in message, f"seed {seed}, {good.name}, {done}: {message}"
    assert len(message) < 2_000, f"seed {seed}, {good.name}, {done}: {message}"


@pytest.mark.sampled
@pytest.mark.parametrize("seed", range(12))
def test_a_damaged_folder_is_read_or_refused_in_one_line(folders, seed, tmp_path):
    check_folder(folders, seed, tmp_path)


@pytest.mark.slow
def test_many_damaged_folders(folders, tmp_path):
    for seed in MANY:
        check_folder(folders, seed, tmp_path)


OPTIONS = (
    *(
        "--model.layers",
        "--model.width",
        "--model.heads",
        "--model.vocab",
        "--model.dropout",
        "--model.remat",
        "--seed",
    ),
    *("--pretrain.steps", "--pretrain.ema", "--pretrain.data.batch", "--pretrain.data.length", "--chat.prompts"),
    *("--pretrain.optimizer.learning_rate", "--pretrain.optimizer.schedule.warmup", "--mesh.fsdp", "--mesh.data"),
    *(
        "--model.positions",
        "--pretrain.optimizer",
        "--chat.data.source",
        "--pretrain.evaluations.0",
        "--pretrain.adapter",
    ),
    *(
        "--out",
        "--profile",
        "--mirror",
        "--accept_changes",
        "--print",
        "--model.positions.theta",
        "--model",
        "--",
        "-x",
    ),
)
TYPED = (
    "0",
    "-1",
    "3",
    "1e9",
    "nan",
    "-inf",
    str(2**63),
    "9" * 5_000,
    "",
    " ",
    "None",
    "True",
    "x" * 300,
    "é",
    "5:3",
    "--",
    *("ALiBi", "Muon", "Text", "Answers", "LoRA", "Stage", "Experiment", "__class__"),
)


def check_command(seed: int, capsys) -> None:
    """The launcher prints the configuration and returns 0, or prints one line that begins with error and returns 2."""
    rng = random.Random(seed)
    command = ["quickstart", "--print"]
    for _ in range(rng.choice((1, 2))):
        command += [rng.choice(OPTIONS), *rng.choices(TYPED, k=rng.choice((0, 1, 1, 1, 2)))]
    code = launcher.main(command)
    out, err = capsys.readouterr()
    assert (code, bool(out)) in ((0, True), (2, False)), f"seed {seed}: {command}"
    assert (code, err.count("\n"), err.startswith("error: ")) in ((0, 0, False), (2, 1, True)), f"seed {seed}: {err}"


@pytest.mark.parametrize("seed", range(12))
def test_a_mistaken_command_is_answered_in_one_line(seed, capsys):
    check_command(seed, capsys)


@pytest.mark.slow
def test_many_mistaken_commands(capsys):
    for seed in MANY:
        check_command(seed, capsys)
