"""DPO on real pairs, cross-validated beside the rule "the shorter reply": `python -m experiments harmless --folds 10`.

2,312 dialogues of Anthropic's harmless-base (Bai et al. 2022, arXiv:2204.05862; the text is offensive) are downloaded,
or read from `--preferences.data.source.path` (and `--preferences.evaluations.0.source.path`). They train stories260k,
a model of 260,000 parameters, which is in the folder `stories260k`. Folds keep pairs with one first question together.

9 pairs cannot be compared. Of the other 2,303 the rule, which reads nothing, is right in 55.4 % [53.4 %, 57.5 %]. A
model this small promises no more, and no bound is set: a fold of 230 pairs has an interval of 6 points to either side.
The ten folds were not yet trained to the end.
"""

from gptjax.experiments.preferences import CONFIG, MODEL  # pyright: ignore[reportMissingImports]

from gptjax import Experiment, Stage, data, evals, objectives, optim

PAIRS = data.PreferencesJsonl("https://github.com/anthropics/hh-rlhf/raw/master/harmless-base/test.jsonl.gz")
DIALOGUE = data.PlainText("\n\nHuman: ", "\n\nAssistant: ", append_eos=True)

experiment = Experiment(
    model=CONFIG,
    tokenizer=data.LoadTokenizer(MODEL),
    init_from=MODEL,
    stages={
        "preferences": Stage(
            data=data.Preferences(PAIRS, length=1_024, batch=16, template=DIALOGUE),
            objective=objectives.DPO(beta=0.1),
            optimizer=optim.AdamW(learning_rate=3e-4, schedule=optim.Linear(warmup=10), clip=1.0),
            steps=130,
            evaluate_every=200,
            save_every=200,
            prompts=(),
            evaluations=(evals.PreferenceAccuracy(PAIRS, length=512, template=DIALOGUE),),
        )
    },
)
