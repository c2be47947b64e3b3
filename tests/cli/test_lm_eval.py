"""lm-eval reads our models as its `hf` back end reads the same ones: ids first, then likelihoods and texts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gptjax

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install -e '.[torch]'")
pytestmark = [pytest.mark.torch]

STORY = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
CONTEXTS = ["", STORY, STORY + " ", STORY + "\n", "Question: 1+1?\nAnswer:", "Hi", STORY * 12]
ENDINGS = (" One day", "One day, she saw a big dog.", " é 狗", "!")


@pytest.fixture(scope="module", params=["byte-level", pytest.param("sentencepiece", marks=pytest.mark.real)])
def folder(request, tmp_path_factory) -> Path:
    """A model for both: stories260k, or a random GPT-2 whose tokenizer adds no special token to a text."""
    import tokenizers
    import torch
    import transformers

    path = tmp_path_factory.mktemp("model")
    if request.param == "sentencepiece":
        stories = request.getfixturevalue("shared") / "models" / "stories260k"
        gptjax.load(stories).save_hf(path / "m")
        return path / "m"
    library = tokenizers.ByteLevelBPETokenizer()
    library.train_from_iterator([STORY, "Question: two?\nAnswer: 2"], 320, special_tokens=["<|endoftext|>"])
    end = "<|endoftext|>"
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=library._tokenizer, bos_token=end, eos_token=end)
    fast.save_pretrained(path)
    torch.manual_seed(0)
    sizes = {"vocab_size": len(fast), "n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 2}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, initializer_range=0.2)
    transformers.GPT2LMHeadModel(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def both(folder):
    from lm_eval.models.huggingface import HFLM

    from gptjax.cli.lm_eval import GptjaxLM

    return GptjaxLM(folder, max_length=128), HFLM(str(folder), device="cpu", batch_size=4, max_length=128)


def asked(kind: str, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


def recorded(model, monkeypatch) -> list:
    """Requests that reach the scorer of ids, as they come."""
    found, score = [], model._loglikelihood_tokens

    def recording(requests, **options):
        found.extend((tuple(context), tuple(ids)) for _, context, ids in requests)
        return score(requests, **options)

    monkeypatch.setattr(model, "_loglikelihood_tokens", recording)
    return found


@pytest.mark.sampled
def test_ids_then_likelihoods(both, monkeypatch):
    requests = asked("loglikelihood", *((context, ending) for context in CONTEXTS for ending in ENDINGS))
    ids = [recorded(model, monkeypatch) for model in both]
    ours, theirs = (model.loglikelihood(requests, disable_tqdm=True) for model in both)
    assert ids[0] == ids[1]
    assert max(map(len, (context for context, _ in ids[0]))) > both[0].max_length, "some are cut on the left"
    assert both[0].max_length == both[1].max_length
    np.testing.assert_allclose([x for x, _ in ours], [x for x, _ in theirs], atol=1e-3)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_rolling_likelihoods_of_texts_longer_than_the_context(both, monkeypatch):
    requests = asked("loglikelihood_rolling", (STORY * 12,), ("a",), (STORY,))
    ids = [recorded(model, monkeypatch) for model in both]
    ours, theirs = (model.loglikelihood_rolling(requests, disable_tqdm=True) for model in both)
    assert ids[0] == ids[1]
    np.testing.assert_allclose(ours, theirs, atol=1e-3, rtol=1e-5)


@pytest.mark.alone
def test_replies(both):
    options = {"until": [".", "\n\n"], "max_gen_toks": 24, "do_sample": False}
    requests = asked("generate_until", *((context, dict(options)) for context in (STORY, "Hi", STORY * 12)))
    ours, theirs = (model.generate_until(requests, disable_tqdm=True) for model in both)
    # A character that the limit cuts is one U+FFFD here, and one for each byte there.
    assert [text.rstrip("\ufffd") for text in ours] == [text.rstrip("\ufffd") for text in theirs]


TASK = """
task: stories
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
target_delimiter: " "
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


@pytest.mark.slow
@pytest.mark.real
def test_the_command_line_on_a_local_task(tmp_path, shared):
    """Figures and samples of both back ends are the same, and nothing is asked of the hub."""
    gptjax.load(shared / "models" / "stories260k").save_hf(tmp_path / "model")
    items = [
        {"context": STORY + " " * (i % 2), "choices": ["She was happy.", f"{i} dogs ran", "x"], "gold": i % 3}
        for i in range(12)
    ]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "stories.yaml").write_text(TASK.replace("FILE", str(tmp_path / "items.jsonl")))
    common = ["--tasks", "stories", "--include_path", str(tmp_path / "tasks"), "--log_samples"]
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    for name, command in (
        ("ours", ["gptjax.cli.main", "lm-eval", "--model_args", f"path={tmp_path / 'model'}"]),
        ("hf", ["lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={tmp_path / 'model'}"]),
    ):
        command = [sys.executable, "-m", *command, *common, "--output_path", str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, env=offline, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
    samples = []
    for name in ("ours", "hf"):
        (file,) = (tmp_path / name).rglob("samples_*.jsonl")
        samples.append(
            sorted((json.loads(line) for line in file.read_text().splitlines()), key=lambda each: each["doc_id"])
        )
    for ours, theirs in zip(*samples, strict=True):
        assert (ours["arguments"], ours["acc"], ours["acc_norm"]) == (
            theirs["arguments"],
            theirs["acc"],
            theirs["acc_norm"],
        )
        values = [[float(reply[0][0]) for reply in each["resps"]] for each in (ours, theirs)]
        np.testing.assert_allclose(*values, atol=1e-3)
