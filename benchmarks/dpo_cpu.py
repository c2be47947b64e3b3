"""A step of DPO on a CPU compared with trl's DPOTrainer: the same weights, batch and work, as a markdown table.

    python benchmarks/dpo_cpu.py                        # one core, where CPU time is fair on a busy machine too

A step is the loss of policy and reference, the gradient, clipping and AdamW, on pairs of random tokens; all sequences
are full, so that neither has padding. The first value is the loss.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

import numpy as np
from beside_trl import VOCAB, Shape, Work, compare


def pairs(shape: Shape) -> np.ndarray:
    """int32 [B, 2, T]: chosen and rejected conversations; the first quarter is the prompt."""
    tokens = np.random.default_rng(0).integers(VOCAB, size=(shape.batch, 2, shape.length), dtype=np.int32)
    tokens[:, 1, : shape.length // 4] = tokens[:, 0, : shape.length // 4]
    return tokens


def gptjax(folder: str, shape: Shape) -> Work:
    """The step of a stage's program."""
    from gptjax.distributed import processes

    processes.configure()
    import jax

    from gptjax import Stage, data, load, objectives, optim
    from gptjax.train.program import program
    from gptjax.types import PreferencePairs

    loaded, batch, length = load(f"{folder}/model"), shape.batch, shape.length
    tokens = pairs(shape).reshape(batch, 2 * length)
    segments = np.repeat(np.array([[1, 2]], np.int32), length, 1).repeat(batch, 0)
    positions = np.tile(np.arange(length, dtype=np.int32), (batch, 2))
    weights = ((positions >= length // 4 - 1) & (positions < length - 1)).astype(np.float32)
    margins = np.zeros(batch, np.float32)
    made = PreferencePairs(tokens, np.roll(tokens, -1, 1), weights, segments, positions, margins)
    stage = Stage(
        data=data.Preferences(data.PreferencesJsonl(""), length=2 * length, batch=batch),
        objective=objectives.DPO(),
        optimizer=optim.AdamW(learning_rate=1e-4, clip=1.0),
        steps=100_000,
    )
    functions = program(stage, loaded.config.build())
    reference = loaded.params
    state = jax.jit(functions.init_state)(reference)
    on_device: Any = jax.device_put(made)

    def step() -> float:
        nonlocal state
        state, metrics = functions.step(state, on_device, reference)
        total, weight = metrics["loss"]
        return float(total) / float(weight)

    return {"step": step}


def trl(folder: str, shape: Shape) -> Work:
    """The loss of trl's trainer, with PyTorch's AdamW."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaForCausalLM
    from trl import DPOConfig, DPOTrainer

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    policy, reference = (LlamaForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32) for _ in range(2))
    arguments = DPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        report_to="none",
        gradient_checkpointing=False,
        per_device_train_batch_size=shape.batch,
        learning_rate=1e-4,
    )
    trainer = DPOTrainer(
        model=policy,
        ref_model=reference,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "w3", "chosen": "w4", "rejected": "w5"}] * shape.batch),
        processing_class=AutoTokenizer.from_pretrained(f"{folder}/tokenizer"),
    )
    trainer.model.train()
    optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=1e-4)
    ids = torch.tensor(pairs(shape).transpose(1, 0, 2).reshape(-1, shape.length).astype(np.int64))
    mask = torch.ones_like(ids)
    replies = (torch.arange(shape.length) >= shape.length // 4) * mask
    inputs = {"input_ids": ids, "attention_mask": mask, "completion_mask": replies}

    def step() -> float:
        loss = trainer.compute_loss(trainer.model, dict(inputs))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return {"step": step}


if __name__ == "__main__":
    compare(__doc__, gptjax, trl, batch=4)
