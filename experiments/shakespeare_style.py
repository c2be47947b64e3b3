"""Teach a published model of children's stories the style of Shakespeare: all of its weights, LoRA or QLoRA.

    python -m experiments shakespeare_style --sweep variant=full,lora,qlora

The model is `stories260k` (karpathy/tinyllamas, Llama architecture) as a folder for transformers, `--init_from FOLDER
--tokenizer.path FOLDER`; the text is downloaded, or read from `--style.data.source.path tinyshakespeare.txt`. Before
training, the validation loss is 5.010 nats a token. After 400 steps, by learning rate:

             1e-3     3e-3     1e-2     3e-2     share of the best improvement
    full     2.649    2.576    2.620             100 %
    lora              2.707    2.688    3.798    95.4 %
    qlora             2.727    2.695    4.119    95.1 %

LoRA reaches 95 % and QLoRA 90 % of full fine-tuning's improvement, each at its best rate of three. The rank is 32 on
matrices that are 64 wide; the embeddings, an eighth of the parameters, stay as they were. Not timed on an idle machine:
three to five minutes a run beside other work on two CPU cores.
"""

import dataclasses

from gptjax import Expect, Experiment, Stage, data, objectives, optim
from gptjax.nn import LoRA, MultiHeadAttention, TransformerConfig

MODEL = "stories260k"
TEXT = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


BEFORE, FULL = 5.010, 2.576
"""Validation losses before and after full fine-tuning."""


def style(learning_rate: float, share: float, adapter: LoRA | None = None) -> Experiment:
    """An experiment that trains everything or an adapter, and reaches this share of full fine-tuning's improvement."""
    return Experiment(
        model=TransformerConfig(
            512,
            layers=5,
            width=64,
            heads=8,
            kv_heads=4,
            head_size=8,
            hidden=172,
            attention=MultiHeadAttention(bias=False),
        ),
        tokenizer=data.LoadTokenizer(MODEL),
        stages={
            "style": Stage(
                data=data.Pretrain(data.Text(TEXT), length=128, batch=8),
                objective=objectives.NextToken(),
                optimizer=optim.AdamW(
                    learning_rate=learning_rate, schedule=optim.Cosine(warmup=20), weight_decay=0.0, clip=1.0
                ),
                adapter=adapter,
                steps=400,
                evaluate_every=400,
                eval_sequences=400,
                save_every=400,
                prompts=("ROMEO:",),
            )
        },
        init_from=MODEL,
        expect=(Expect("style/validation_loss", below=round(BEFORE - share * (BEFORE - FULL), 3)),),
    )


RANK = LoRA(rank=32, alpha=32)
variants = {
    "full": style(3e-3, 0.99),
    "lora": style(1e-2, 0.95, RANK),
    "qlora": style(1e-2, 0.9, dataclasses.replace(RANK, bits=4)),
}
experiment = variants["lora"]
