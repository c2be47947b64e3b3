"""GPT-2 small (124M) on C4, the published recipe, for 8 or more accelerators: `python -m experiments gpt2_124m`.

Prepare C4 once with `tfds` as ArrayRecord files, in the folder `--pretrain.data.source.data_dir`. GPT-2's tokenizer is
downloaded, or read from the folder `--tokenizer.path`. 50,000 steps of 512 x 1,024 tokens are 26 billion tokens.
Published for this size and recipe on OpenWebText: a validation loss of about 2.85 (nanoGPT). Not yet run to the end;
the step compiles for one device and for meshes. With parameters sharded over all devices:

    python -m experiments gpt2_124m --mesh.data 1 --mesh.fsdp -1
"""

from gptjax import Experiment, Stage, data, objectives, optim
from gptjax.nn import GELU, LayerNorm, LearnedPositions, TransformerConfig

experiment = Experiment(
    model=TransformerConfig(
        vocab=50_304,  # GPT-2's 50,257, padded to a multiple of 128
        layers=12,
        width=768,
        heads=12,
        positions=LearnedPositions(1_024),
        norm=LayerNorm(),
        mlp=GELU(),
        bias=True,
        remat="dots_with_no_batch_dims_saveable",
        dtype="bfloat16",
    ),
    tokenizer=data.LoadTokenizer("gpt2"),
    stages={
        "pretrain": Stage(
            data=data.Pretrain(data.TFDS("c4/en"), length=1_024, batch=512),
            objective=objectives.NextToken(),
            optimizer=optim.AdamW(
                learning_rate=6e-4,
                schedule=optim.Cosine(warmup=2_000, final_fraction=0.1),
                weight_decay=0.1,
                decay_embeddings=True,
                b2=0.95,
                clip=1.0,
            ),
            steps=50_000,
            evaluate_every=1_000,
            eval_sequences=5_120,
            save_every=1_000,
            prompts=("The meaning of life is",),
        )
    },
)
