"""CORE against a plain reading of its definition: one text at a time, in numpy."""

import csv
import itertools
import json
import random

import jax
import numpy as np
import pytest

from gptjax import data, evals
from gptjax.evals import core
from gptjax.models.language_model import LanguageModel
from gptjax.nn import LearnedPositions, TransformerConfig
from gptjax.types import UserError

pytest.importorskip("yaml", reason="needs PyYAML")
TOKENIZER = data.TrainCharacters().build(iter(["abcdefghijklmnopqrstuvwxyz .?:\n"]))
LENGTH = 80
CONFIG = TransformerConfig(vocab=64, layers=1, width=16, heads=2, positions=LearnedPositions(LENGTH))
ANIMALS = ["cat", "cow", "dog", "emu", "fox", "hen", "pig", "rat", "yak"]
QUESTIONS = [
    {"query": f"which animal is a {name}{' really' * (i % 5)}?", "choices": [name, "a " + name, "bird"][: 2 + i % 2]}
    | {"gold": i % 2}
    for i, name in enumerate(ANIMALS)
]
SCHEMAS = [
    {"context_options": [f"the {a} saw the {b} and the {x}" for x in (a, b)], "continuation": "ran off.", "gold": i % 2}
    for i, (a, b) in enumerate(itertools.pairwise(ANIMALS))
]
TASKS = {"animals": ("multiple_choice", 2, ": "), "schema": ("schema", 0, " "), "words": ("language_modeling", 1, "")}


@pytest.fixture(scope="module")
def model():
    shapes = jax.eval_shape(CONFIG.build().init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    draw = np.random.default_rng(3)
    return LanguageModel(
        CONFIG, jax.tree.map(lambda leaf: draw.normal(0, 0.5, leaf.shape).astype(np.float32), shapes), TOKENIZER
    )


def logits(model, ids: list[int]) -> np.ndarray:
    padded = np.zeros((1, LENGTH), np.int32)
    padded[0, : len(ids)] = ids
    return np.asarray(model.logits(padded), np.float64)[0, : len(ids)]


def last(model, text: str, count: int) -> tuple[float, bool]:
    """Mean loss of the last `count` characters of a text, and whether greedy decoding writes them."""
    ids = [TOKENIZER.bos, *TOKENIZER.encode(text)][-LENGTH:]
    scores = logits(model, ids)[-count - 1 : -1]
    losses = np.log(np.exp(scores).sum(-1)) - scores[np.arange(count), ids[-count:]]
    return losses.mean(), bool((scores.argmax(-1) == ids[-count:]).all())


@pytest.fixture(scope="module")
def bundle(model, tmp_path_factory):
    """A bundle of three tasks. One word of the last is what the model writes."""
    folder = tmp_path_factory.mktemp("bundle")
    words = [{"context": f" {name} ", "continuation": "xyz"[: i % 3 + 1]} for i, name in enumerate(ANIMALS)]
    order = list(range(len(words)))
    random.Random(1337).shuffle(order)
    (j,) = random.Random(1234).sample(range(1, len(words)), 1)
    item, shown = words[order[0]], words[order[j]]
    before = f"{shown['context'].strip()}{shown['continuation']}\n\n"
    for letters in itertools.product("abcdefgh", repeat=3):  # until the model writes a letter
        item["context"] = "".join(letters)
        ids = [TOKENIZER.bos, *TOKENIZER.encode(before + item["context"])]
        if (written := TOKENIZER.decode([int(logits(model, ids)[-1].argmax())])).isalpha():
            item["continuation"] = written
            break
    (folder / "eval_data").mkdir()
    for name, items in (("animals", QUESTIONS), ("schema", SCHEMAS), ("words", words)):
        (folder / "eval_data" / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    listed = [
        {"label": name, "dataset_uri": f"{name}.jsonl", "num_fewshot": [shots], "icl_task_type": kind}
        | ({} if delimiter == " " else {"continuation_delimiter": delimiter})
        for name, (kind, shots, delimiter) in TASKS.items()
    ]
    (folder / "core.yaml").write_text(json.dumps({"icl_tasks": listed}))  # JSON is YAML
    with (folder / "eval_meta_data.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["Eval Task", "Random baseline"])
        rows.writerows([("animals", 40), ("schema", 50), ("words", 0)])
    return folder


def shared_start(texts: list[str]) -> int:
    return next(i for i in range(min(map(len, texts)) + 1) if len({text[: i + 1] for text in texts}) > 1)


def read(folder, name):
    items = [json.loads(line) for line in (folder / "eval_data" / f"{name}.jsonl").read_text().splitlines()]
    random.Random(1337).shuffle(items)
    return items


def by_definition(model, folder, name) -> list[bool]:
    kind, shots, d = TASKS[name]
    items, right = read(folder, name), []
    for i, item in enumerate(items):
        shown = [items[j] for j in random.Random(1234 + i).sample([j for j in range(len(items)) if j != i], shots)]
        if kind == "multiple_choice":
            before = "".join(f"{s['query']}{d}{s['choices'][s['gold']]}\n\n" for s in shown)
            texts = [before + item["query"] + d + choice for choice in item["choices"]]
            same = shared_start(texts)
            losses = [last(model, text, len(text) - same)[0] for text in texts]
            right.append(int(np.argmin(losses)) == item["gold"])
        elif kind == "schema":
            texts = [context + d + item["continuation"] for context in item["context_options"]]
            same = shared_start([text[::-1] for text in texts])
            right.append(int(np.argmin([last(model, text, same)[0] for text in texts])) == item["gold"])
        else:
            before = "".join(f"{s['context'].strip()}{d}{s['continuation']}\n\n" for s in shown)
            without = before + item["context"].strip()
            text = without + d + item["continuation"]
            right.append(last(model, text, len(text) - len(without))[1])
    return right


def test_items_are_those_of_the_definition(model, bundle):
    evaluation = evals.Core(str(bundle))
    evaluation.check(TOKENIZER)
    result, centred = evaluation(model), []
    for name, baseline in (("animals", 0.4), ("schema", 0.5), ("words", 0.0)):
        expected = by_definition(model, bundle, name)
        assert [bool(item["outcome"]) for item in result.items if item["task"] == name] == expected, name
        assert result.values[name] == pytest.approx(np.mean(expected))
        assert 0 < np.mean(expected) < 1, "both kinds of items"
        centred.append((np.mean(expected) - baseline) / (1 - baseline))
        assert result.values[f"{name}_centred"] == pytest.approx(centred[-1])
    assert result.values["core"] == pytest.approx(np.mean(centred))
    assert result.values["core_low"] < result.values["core"] < result.values["core_high"]


def test_baselines_have_a_name(bundle, tmp_path):
    first = tmp_path / "v1.csv"
    rows = "".join(f"{name},{value}\n" for name, value in core.V1.items())
    first.write_text("Eval Task,Random baseline\nanimals,40\nschema,50\nwords,0\n" + rows)
    assert evals.Core(str(bundle), baselines=str(first)).baseline_name() == "v1"
    assert evals.Core(str(bundle)).baseline_name() != "v1"


def test_the_control_reads_another_context(model, bundle):
    """Each item is measured with the context of the next one."""
    values = evals.Core(str(bundle), control=True)(model).values
    items = read(bundle, "schema")
    swapped = [
        {**a, "context_options": b["context_options"]} for a, b in zip(items, items[1:] + items[:1], strict=True)
    ]
    right = []
    for item in swapped:
        texts = [f"{context} {item['continuation']}" for context in item["context_options"]]
        same = shared_start([text[::-1] for text in texts])
        right.append(int(np.argmin([last(model, text, same)[0] for text in texts])) == item["gold"])
    assert values["schema_control"] == pytest.approx((np.mean(right) - 0.5) / 0.5)


def test_a_damaged_bundle_is_named(bundle, tmp_path):
    with pytest.raises(UserError, match=r"^baselines: .*eval_meta_data.csv cannot be read"):
        evals.Core(str(tmp_path)).check(TOKENIZER)
    file = bundle / "eval_data" / "words.jsonl"
    content = file.read_text()
    try:
        file.write_text(content + '{"context": "a"}\n')
        with pytest.raises(UserError, match=r"words.jsonl:10 has no continuation, must be str"):
            evals.Core(str(bundle)).check(TOKENIZER)
    finally:
        file.write_text(content)
