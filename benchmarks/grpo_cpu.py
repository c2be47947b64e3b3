"""GRPO on a CPU compared with trl's GRPOTrainer: the same weights, batch and settings, as a markdown table.

    python benchmarks/grpo_cpu.py                       # one core, where CPU time is fair on a busy machine too
    python benchmarks/grpo_cpu.py --sizes 4 128 16 128

"log-probabilities" are those of the replies before the update; "update" is the loss, its gradient, clipping and AdamW,
given those; "rollouts" writes the batch's replies at temperature 1, eight to a prompt, all of the same length, by the
engine and by the trainer's own call of transformers. Nothing is scored. trl leaves out the first where only one update
is made on a batch. The first value is the mean of the log-probabilities, the loss, or the number of tokens.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

import numpy as np
from beside_trl import VOCAB, Shape, Work, compare

GROUP = 8


def replies(shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Tokens, int32 [B, T], of which each group has one prompt, and the replies' advantages, float32 [B]."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(3, VOCAB, size=(shape.batch, shape.length), dtype=np.int32)
    tokens[:, : shape.length // 4] = tokens[np.arange(shape.batch) // GROUP * GROUP, : shape.length // 4]
    return tokens, draw.normal(size=shape.batch).astype(np.float32)


def gptjax(folder: str, shape: Shape) -> Work:
    """The programs of a stage, and its writer of replies."""
    from gptjax.distributed import processes

    processes.configure()
    import jax

    from gptjax import Stage, data, load, objectives, optim, tasks
    from gptjax.inference import Sampling
    from gptjax.inference.engine import Engine
    from gptjax.objectives.policy import PreparedEpisodes
    from gptjax.train.episodes import Asked, Writing, write
    from gptjax.train.program import program
    from gptjax.train.rollouts import Rollouts
    from gptjax.types import Episodes

    loaded = load(f"{folder}/model")
    tokens, advantages = replies(shape)
    prompt, positions = shape.length // 4, np.broadcast_to(np.arange(shape.length, dtype=np.int32), tokens.shape)
    weights = ((positions >= prompt - 1) & (positions < shape.length - 1)).astype(np.float32)
    zeros, ones, row = np.zeros_like(weights), np.ones_like(positions), np.ones(shape.batch, np.float32)
    groups = np.arange(shape.batch, dtype=np.int32) // GROUP
    batch = Episodes(
        tokens, np.roll(tokens, -1, 1), weights, ones, positions, zeros, ones - 1, advantages, groups, row, row
    )
    stage = Stage(
        data=Rollouts(tasks.CountLetters(), length=shape.length, batch=shape.batch, group=GROUP),
        objective=objectives.GRPO(kl=0.0, correction="none"),
        optimizer=optim.AdamW(learning_rate=1e-4, clip=1.0),
        steps=100_000,
    )
    model = loaded.config.build()
    functions = program(stage, model)
    state = jax.jit(functions.create_state)(loaded.params)
    on_device: Any = jax.device_put(batch)
    prepared: PreparedEpisodes = functions.prepare(state.params, on_device)
    prepared = jax.device_put(
        PreparedEpisodes(**{**vars(prepared), "advantages": advantages[:, None] * weights})  # those of the peer
    )
    words = data.Bytes().build(iter(())).with_specials(f"<|{i}|>" for i in range(VOCAB - 300))
    engine = Engine(model, loaded.params, words, rows=shape.batch, context=shape.length, stop_token_ids=())
    writing, turn = Writing(shape.length - prompt, Sampling(temperature=1.0)), 0

    def logprobs() -> float:
        found = np.asarray(functions.prepare(state.params, on_device).old_logprobs)
        return float((found * weights).sum() / weights.sum())

    def update() -> float:
        nonlocal state
        state, metrics = functions.step(state, prepared)
        total, weight = metrics["loss"]
        return float(total) / float(weight)

    def rollouts() -> float:
        nonlocal turn
        turn += 1
        engine.update(jax.tree.map(lambda x: x.copy(), state.params))
        asked = [Asked(i // GROUP, i, tuple(map(int, row[:prompt])), turn) for i, row in enumerate(tokens)]
        return sum(len(episode.ids) for episode in write(engine, asked, writing))

    return {"log-probabilities": logprobs, "update": update, "rollouts": rollouts}


def trl(folder: str, shape: Shape) -> Work:
    """The methods of trl's trainer, with PyTorch's AdamW."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    tokens, advantages = replies(shape)
    prompt = shape.length // 4
    new = shape.length - prompt
    arguments = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        report_to="none",
        gradient_checkpointing=False,
        per_device_train_batch_size=shape.batch,
        num_generations=GROUP,
        max_completion_length=new,
        loss_type="grpo",
        beta=0.0,
        generation_kwargs={"min_new_tokens": new},
    )
    trainer = GRPOTrainer(
        model=LlamaForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "w3"}] * shape.batch),
        processing_class=AutoTokenizer.from_pretrained(f"{folder}/tokenizer"),
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=1e-4)
    ids = torch.tensor(tokens.astype(np.int64))
    ones = torch.ones_like(ids)
    inputs = {
        "prompt_ids": ids[:, :prompt],
        "prompt_mask": ones[:, :prompt],
        "completion_ids": ids[:, prompt:],
        "completion_mask": ones[:, prompt:],
        "advantages": torch.tensor(advantages),
    }

    def before() -> torch.Tensor:
        with torch.no_grad():
            return trainer._get_per_token_logps_and_entropies(trainer.model, ids, ones, new)[0]

    inputs["old_per_token_logps"] = before()

    def update() -> float:
        loss = trainer.compute_loss(trainer.model, dict(inputs))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    def rollouts() -> float:
        completions, _ = trainer._generate_single_turn(tokens[:, :prompt].tolist(), None, {}, GROUP)
        trainer.model.train()
        return sum(map(len, completions))

    return {"log-probabilities": lambda: before().mean().item(), "update": update, "rollouts": rollouts}


if __name__ == "__main__":
    compare(__doc__, gptjax, trl, batch=16)
