"""Tokenisation before a run, beside `datasets.map` with the same tokenizer: `python benchmarks/prepare.py`.

Both read the same JSON lines and write tokens to disk, in as many processes, by turns; figures are medians, on the
clock and of processor time, which other work on the machine changes less. The ids are compared. Needs
`pip install -e '.[torch]'` and a tokenizer.json (by default one is trained here).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np


def corpus(path: Path, megabytes: int) -> None:
    """JSON lines of the documentation of Python, as often as it takes."""
    from gptjax.data import PyDocs

    texts, written, copy = list(PyDocs().documents("train")), 0, 0
    with path.open("w") as file:
        while written < megabytes << 20:
            for text in texts:
                written += file.write(json.dumps({"text": f"{text}\n{copy}"}) + "\n")
            copy += 1


def tokenizer_json(folder: Path, vocab: int) -> Path:
    """A byte-level BPE, as GPT-2's."""
    import tokenizers

    from gptjax.data import PyDocs

    found = tokenizers.Tokenizer(tokenizers.models.BPE())
    found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    found.train_from_iterator(PyDocs().documents("train"), trainer)
    found.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def ours(lines: Path, tokenizer: Path, out: Path, processes: int) -> np.ndarray:
    from gptjax.data import Jsonl, load_tokenizer
    from gptjax.data.encoding import encode_texts
    from gptjax.data.shards import Workers, make_store

    source = Jsonl(str(lines), validation=0.0)
    store = make_store(source, load_tokenizer(tokenizer), "train", out, encode_texts, str, Workers(processes))
    assert store is not None
    return store.tokens()


def theirs(lines: Path, tokenizer: Path, out: Path, processes: int) -> np.ndarray:
    import datasets
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer))
    end = fast.convert_tokens_to_ids("<|endoftext|>")

    def encode(rows):
        found = fast(rows["text"], add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False)
        return {"ids": [[end, *ids, end] for ids in found["input_ids"]]}

    rows = datasets.load_dataset("json", data_files=str(lines), split="train", cache_dir=str(out))
    mapped = rows.map(encode, batched=True, num_proc=processes, remove_columns=["text"])
    return mapped.with_format("numpy")["ids"]


def processor_seconds() -> float:
    """Processor time of this process and of those that it started and that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocab", type=int, default=16_384)
    options = parser.parse_args()
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    times: dict[str, list[tuple[float, float]]] = {"gptjax data prepare": [], "datasets.map": []}
    with tempfile.TemporaryDirectory() as folder:
        lines, tokenizer = Path(folder) / "text.jsonl", tokenizer_json(Path(folder), options.vocab)
        corpus(lines, options.megabytes)
        found = {}
        for number in range(options.rounds):
            for name, function in (("gptjax data prepare", ours), ("datasets.map", theirs)):
                begin = time.perf_counter(), processor_seconds()
                found[name] = function(lines, tokenizer, Path(folder) / f"{name} {number}", options.processes)
                times[name].append((time.perf_counter() - begin[0], processor_seconds() - begin[1]))
        tokens = found["gptjax data prepare"]
        first = np.concatenate([np.asarray(ids) for ids in found["datasets.map"][:1000]])
        assert tokens[: len(first)].tolist() == first.tolist(), "the ids differ"
    median = {name: [statistics.median(kind) for kind in zip(*values, strict=True)] for name, values in times.items()}
    print(f"{options.megabytes} MiB of text, {len(tokens):,} tokens, {options.processes} processes")
    print("| | s (each round) | CPU s (each round) | times datasets.map | by CPU time |")
    print("|---|---:|---:|---:|---:|")
    for name, values in median.items():
        each = [", ".join(f"{value:.1f}" for value in kind) for kind in zip(*times[name], strict=True)]
        clock, cpu = (theirs / value for theirs, value in zip(median["datasets.map"], values, strict=True))
        print(f"| {name} | {values[0]:.1f} ({each[0]}) | {values[1]:.1f} ({each[1]}) | {clock:.2f} | {cpu:.2f} |")


if __name__ == "__main__":
    main()
