"""Parameter groups: each parameter by the optimizer of its group, and as a configuration like any other."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from architectures import ARCHITECTURES

from gptjax.cli.options import override
from gptjax.config import from_json, to_json
from gptjax.distributed.parameters import flat, parameter_info
from gptjax.optim import AdamW, Constant, Cosine, Group, Groups, HasAxis, HasKind, Lion, MaxAxes, Muon
from gptjax.types import UserError

NANOCHAT = Groups(
    Muon(learning_rate=0.02, schedule=Constant(), weight_decay=0.0, clip=None),
    {
        "tokens": Group(HasAxis("vocab"), AdamW(learning_rate=0.2, schedule=Constant(), weight_decay=0.5, clip=None)),
        "embeddings": Group(HasKind("embedding"), Lion(learning_rate=0.3, schedule=Constant(), clip=None)),
        "scalars": Group(MaxAxes(0), AdamW(learning_rate=0.5, schedule=Constant(), b1=0.96, clip=None)),
    },
)
INFO = parameter_info(ARCHITECTURES["value embedding"].build())


def test_each_parameter_is_trained_by_its_groups_optimizer():
    rng = np.random.default_rng(0)
    params, *gradients = (jax.tree.map(lambda i: rng.normal(size=i.shape).astype(np.float32), INFO) for _ in range(3))

    def moves(optimizer):
        transform = optimizer.build(10, INFO)
        state = transform.init(params)
        for gradient in gradients:
            updates, state = jax.jit(transform.update)(gradient, state, params)
        return flat(updates)

    got, alone = moves(NANOCHAT), {name: moves(group.optimizer) for name, group in NANOCHAT.groups.items()}
    alone["default"] = moves(NANOCHAT.default)
    scalars = {f"blocks/{name}" for name in ("stream_scale", "input_scale")}
    groups = dict.fromkeys(scalars, "scalars") | {
        "embedding": "tokens",
        "blocks/attention/values_embedding": "embeddings",
    }
    for name in flat(INFO):
        np.testing.assert_allclose(got[name], alone[groups.get(name, "default")][name], rtol=1e-6, err_msg=name)


def test_groups_are_a_configuration():
    assert from_json(json.loads(json.dumps(to_json(NANOCHAT)))) == NANOCHAT
    changed = override(NANOCHAT, ["--tokens.optimizer.learning_rate", "0.1"], "optimizer", "")
    assert changed.groups["tokens"].optimizer.learning_rate == 0.1
    assert changed.groups["tokens"].when == HasAxis("vocab")
    decayed = NANOCHAT.with_schedule(Cosine())
    assert {optimizer.schedule for optimizer in (decayed.default, decayed.groups["scalars"].optimizer)} == {Cosine()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda: dataclasses.replace(NANOCHAT, groups={"head": Group(HasKind("head"), AdamW())}),
            "optimizer.groups.head",
        ),
        (lambda: dataclasses.replace(NANOCHAT, groups={"default": Group(MaxAxes(1), AdamW())}), "optimizer.groups"),
        (lambda: HasKind("vector"), "optimizer.groups.when.kind: got vector, must be one of matrix"),  # pyright: ignore
    ],
)
def test_bad_groups_are_named(change, message):
    with pytest.raises(UserError, match=message):
        change().build(10, INFO)
