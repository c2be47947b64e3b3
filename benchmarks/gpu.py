"""A training step on one GPU, in bfloat16: milliseconds, tokens a second, MFU, compile time. One JSON object a line.

    python benchmarks/gpu.py --model gpt2_124m --segments documents
    python benchmarks/gpu.py --model llama_1b --unroll 48 --profile 20

`benchmarks/torch_gpu.py` is its peer. Compare figures of one machine only, from runs one after the other.

    --segments  none        the batch has no segments
                one         one segment a row, as in a run whose documents are long
                documents   five documents a row on average, of random lengths
                many        32 tokens a document on average: more than cuDNN's packed form takes
"""

from __future__ import annotations

import argparse
import collections
import glob
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gptjax.distributed import processes

if TYPE_CHECKING:
    from gptjax.nn import TransformerConfig
    from gptjax.types import Batch


def config_of(name: str, **settings: Any) -> tuple[TransformerConfig, int, int]:
    """The model's configuration, tokens per row, rows per step."""
    from gptjax.nn import GELU, LayerNorm, LearnedPositions, RMSNorm, RoPE, SwiGLU, TransformerConfig

    if name == "llama_1b":
        parts = {"positions": RoPE(), "norm": RMSNorm(), "mlp": SwiGLU(), "tie_embeddings": False}
        sizes = {"vocab": 32_000, "layers": 16, "width": 2048, "heads": 16, "kv_heads": 8, "hidden": 5632}
        length, rows = 2048, 8
    else:
        length, rows = 1024, 32
        parts = {"positions": LearnedPositions(length), "norm": LayerNorm(), "mlp": GELU(), "bias": True}
        sizes = {"vocab": 50_304, "layers": 12, "width": 768, "heads": 12}
    if name == "tiny":
        sizes, length, rows = sizes | {"vocab": 300, "layers": 2, "width": 128, "heads": 2}, 128, 2
    return TransformerConfig(**sizes, **parts, **{"dtype": "bfloat16", **settings}), length, rows


def batch_of(vocab: int, length: int, rows: int, kind: str) -> Batch:
    """Random tokens. See the module for the kinds of segments."""
    import numpy as np

    from gptjax.types import Batch

    random = np.random.default_rng(0)
    text = random.integers(vocab, size=(rows, length + 1), dtype=np.int32)
    documents = {"none": 1, "one": 1, "documents": 5, "many": length // 32}[kind]
    begins = random.random((rows, length)) < (documents - 1) / length
    segments = None if kind == "none" else 1 + np.cumsum(begins, axis=1, dtype=np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    return Batch(text[:, :-1], text[:, 1:], np.ones((rows, length), np.float32), segments, positions)


def measure(arguments: argparse.Namespace, wait: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Compile, wait, run."""
    started = time.perf_counter()
    import jax

    from gptjax import data, objectives, optim
    from gptjax.monitor.chips import peak_flops
    from gptjax.train.program import program
    from gptjax.train.stage import Stage

    if arguments.unroll is not None:
        from gptjax.nn import scan

        scan.MAX_UNROLL = dict.fromkeys(scan.MAX_UNROLL, arguments.unroll)
    settings: dict[str, Any] = {"remat": arguments.remat, "float8": arguments.float8}
    if arguments.implementation:
        from gptjax.nn import MultiHeadAttention

        settings["attention"] = MultiHeadAttention(implementation=arguments.implementation)
    config, length, rows = config_of(arguments.model, **settings)
    rows = arguments.rows or rows
    stage = Stage(
        data=data.Pretrain(data.PyDocs(), length=length, batch=rows),
        objective=objectives.NextToken(chunk=arguments.chunk),
        optimizer=optim.AdamW(learning_rate=6e-4),
        steps=1000,
    )
    model = config.build()
    functions = program(stage, model)
    batch = batch_of(config.vocab, length, rows, arguments.segments)
    times = [time.perf_counter()]
    initial = jax.jit(functions.init_state).lower().compile()
    times.append(time.perf_counter())
    lowered = functions.step.lower(jax.eval_shape(functions.init_state), jax.eval_shape(lambda: batch))
    times.append(time.perf_counter())
    compiled = lowered.compile()
    times.append(time.perf_counter())
    text, memory = compiled.as_text() or "", compiled.memory_analysis()
    started_up, initialised, traced, ready = (round(b - a, 1) for a, b in itertools.pairwise([started, *times]))
    result = {
        "import_s": started_up,
        "compile_init_s": initialised,
        "trace_s": traced,
        "compile_s": ready,
        "temporaries_GiB": round(memory.temp_size_in_bytes / 2**30, 1),
        "cudnn_attention": text.count('custom_call_target="__cudnn$fmha'),
        "instructions": text.count("\n"),
    }
    if arguments.text:
        with open(arguments.text, "w") as file:
            file.write(text)
    wait()
    batch, state = jax.device_put(batch), initial()

    def steps(count: int) -> tuple[float, float]:
        nonlocal state
        metrics: dict[str, Any] = {}
        before = time.perf_counter()
        for _ in range(count):
            state, metrics = compiled(state, batch)
        loss = float(metrics["loss"][0]) / float(metrics["loss"][1])
        return 1e3 * (time.perf_counter() - before) / count, loss

    first, loss_before = steps(1)
    result["first_step_s"] = round(times[-1] - started + first / 1e3, 1)
    steps(3)
    turns = [steps(arguments.steps) for _ in range(arguments.turns)]
    ms = statistics.median(turn[0] for turn in turns)
    statistics_, peak = jax.local_devices()[0].memory_stats() or {}, peak_flops(jax.devices()[0].device_kind)
    result |= {
        "ms": round(ms, 2),
        "spread": [round(min(t[0] for t in turns), 2), round(max(t[0] for t in turns), 2)],
        "tokens_per_s": round(rows * length / ms * 1e3),
        "mfu": round(100 * config.flops(length) * rows * length / ms * 1e3 / peak, 1) if peak else None,
        "peak_GiB": round(statistics_.get("peak_bytes_in_use", 0) / 2**30, 1),
        "loss": [round(loss_before, 3), round(turns[-1][1], 3)],
    }
    if arguments.profile:
        profile(lambda: steps(3), arguments.profile)
    return result


def profile(run: Any, shown: int) -> None:
    """Print the kernels that take most time, in milliseconds a step, after a run of three steps."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (file,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        times: collections.Counter[str] = collections.Counter()
        counts: collections.Counter[str] = collections.Counter()
        for plane in jax.profiler.ProfileData.from_file(file).planes:
            for line in plane.lines if "GPU" in plane.name else ():
                for event in line.events if "Compute" in line.name else ():
                    times[event.name[:90]] += event.duration_ns / 3e6
                    counts[event.name[:90]] += 1
    print(f"# kernels: {sum(times.values()):.2f} ms a step")
    for name, ms in times.most_common(shown):
        print(f"#   {ms:7.3f} ms  {counts[name] / 3:5.1f} x  {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt2_124m", choices=["gpt2_124m", "llama_1b", "tiny"])
    parser.add_argument("--segments", default="one", choices=["none", "one", "documents", "many"])
    parser.add_argument("--rows", type=int, help="rows per step (default: 32 of GPT-2, 8 of Llama)")
    parser.add_argument("--remat", help="rematerialisation policy (default: none)")
    parser.add_argument("--float8", action="store_true", help="products of the blocks' matrices in 8 bits")
    parser.add_argument("--chunk", type=int, help="tokens per chunk of logits (default: the objective's choice)")
    parser.add_argument("--implementation", help="attention kernel (default: the model's choice)")
    parser.add_argument("--unroll", type=int, help="maximum depth of an unrolled stack (default: the model's choice)")
    parser.add_argument("--steps", type=int, default=10, help="steps per turn (default 10)")
    parser.add_argument("--turns", type=int, default=5, help="turns (default 5)")
    parser.add_argument("--profile", type=int, default=0, help="number of kernels to list (default 0)")
    parser.add_argument("--text", help="file for the compiled program's text")
    arguments = parser.parse_args()
    processes.configure()
    given = {name: value for name, value in vars(arguments).items() if value not in (None, 0, False)}
    print(json.dumps({**given, **measure(arguments)}), flush=True)


if __name__ == "__main__":
    main()
