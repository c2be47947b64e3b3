"""Preference losses and their gradients equal those of trl's trainers on the same log-probabilities, and the values
that torchtune and MaxText publish."""

import collections
import json
import os
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.objectives import CPO, DPO, IPO, KTO, ORPO, SimPO
from gptjax.objectives.preference import Replies

PAIRS, LENGTH = 12, 16
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def sides() -> tuple[Replies, Replies]:
    """Random pairs under a policy and a reference."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(1, LENGTH, (2, PAIRS)).astype(np.float32)
    sums = -draw.uniform(0.1, 3, (2, 2, PAIRS)) * tokens
    policy, reference = (Replies(*map(jnp.float32, (*side, *tokens))) for side in sums)
    return policy, reference


@pytest.fixture(scope="module")
def trl():
    """The modules of trl with its losses."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    pytest.importorskip("trl", reason="compares with trl: pip install -e '.[torch]'")
    import torch
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.kto_trainer import KTOTrainer

    return types.SimpleNamespace(torch=torch, DPO=DPOTrainer, KTO=KTOTrainer, CPO=CPOTrainer, ORPO=ORPOTrainer)


def ours(objective, policy, reference):
    """Mean loss, and its gradient for the log-probabilities of chosen and rejected replies [2, B]."""

    def mean(sums):
        return objective.loss(
            Replies(*sums, policy.chosen_tokens, policy.rejected_tokens), jax.lax.stop_gradient(reference)
        ).mean()

    return jax.value_and_grad(mean)(jnp.stack([policy.chosen, policy.rejected]))


def gathering():
    """A stand-in for accelerate's Accelerator, of one process."""
    same = lambda x: x  # noqa: E731
    return types.SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same)


def per_token(torch, replies):
    """Log-probability of each token [2 B, T - 1], the same for all of a reply; 0 where there is none."""
    sums = np.concatenate([replies.chosen, replies.rejected])
    tokens = np.concatenate([replies.chosen_tokens, replies.rejected_tokens])
    mask = np.arange(LENGTH - 1) < tokens[:, None]
    return torch.tensor(mask * (sums / tokens)[:, None]), torch.tensor(mask)


def theirs(trl, policy, reference, trainer="DPO", more=(), **settings):
    """`ours`, from one of trl's trainers with a model that returns these log-probabilities."""
    torch = trl.torch
    logprobs, mask = per_token(torch, policy)
    logprobs.requires_grad_()
    other, _ = per_token(torch, reference)

    class Model(torch.nn.Module):
        is_gradient_checkpointing = False

        def __init__(self, values):
            super().__init__()
            self.values = values

        def forward(self, **inputs):
            zeros = torch.zeros(2 * PAIRS, LENGTH - 1)
            return types.SimpleNamespace(log_probs=self.values, entropy=zeros, mean_logits=zeros, is_top1=mask)

    made = types.SimpleNamespace(
        model=Model(logprobs),
        ref_model=Model(other),
        accelerator=gathering(),
        args=types.SimpleNamespace(gradient_checkpointing_kwargs=None),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=False,
        f_divergence_type="reverse_kl",
        loss_weights=[1.0],
        use_weighting=False,
        _metrics={"train": collections.defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )
    whole = torch.cat([torch.zeros(2 * PAIRS, 1, dtype=torch.bool), mask], 1)
    inputs = {"input_ids": whole.long(), "attention_mask": whole.long(), "completion_mask": whole.long(), **dict(more)}
    loss = getattr(trl, trainer)._compute_loss(made, made.model, inputs, False)
    loss.backward()
    return loss.item(), logprobs.grad[:, 0].reshape(2, PAIRS).numpy()


@pytest.mark.torch
@pytest.mark.parametrize(
    ("objective", "loss_type"),
    [
        (DPO(0.3), "sigmoid"),
        (DPO(5.0, length_normalised=True), "sigmoid_norm"),
        (DPO(0.3, reference_free=True), "sigmoid"),
        (IPO(0.2), "ipo"),
    ],
    ids=str,
)
def test_losses_with_a_reference_are_those_of_trl(objective, loss_type, sides, trl):
    policy, reference = sides
    other = reference if objective.reference else reference.over(reference)
    loss, gradient = theirs(trl, policy, other, loss_types=[loss_type], beta=objective.beta)
    found, grad = ours(objective, policy, reference)
    np.testing.assert_allclose(found, loss, **TOLERANCE)
    np.testing.assert_allclose(grad, gradient, **TOLERANCE)


@pytest.mark.torch
@pytest.mark.parametrize("kl", [-0.5, 2.5])
def test_kto_is_that_of_trl(kl, sides, trl):
    """Chosen replies are desirable, rejected ones not; the baseline is clamped."""
    (policy, reference), torch = sides, trl.torch
    objective = KTO(0.3, desirable_weight=1.3, undesirable_weight=0.7)
    labels = np.repeat([True, False], PAIRS)
    loss, gradient = theirs(
        trl,
        policy,
        reference,
        "KTO",
        {"label": torch.tensor(labels)},
        beta=0.3,
        desirable_weight=1.3,
        undesirable_weight=0.7,
        loss_type="kto",
        calculate_KL=True,
        _compute_kl_logps=lambda model, batch: torch.full((2 * PAIRS,), kl if model.values.requires_grad else 0.0),
    )

    def mean(sums):
        ratio = sums - jnp.concatenate([reference.chosen, reference.rejected])
        return objective.loss(ratio, jnp.full(2 * PAIRS, max(kl, 0)), jnp.float32(labels)).mean()

    found, grad = jax.value_and_grad(mean)(jnp.concatenate([policy.chosen, policy.rejected]))
    np.testing.assert_allclose(found, loss, **TOLERANCE)
    np.testing.assert_allclose(grad.reshape(2, PAIRS), gradient, **TOLERANCE)


@pytest.mark.torch
def test_label_smoothing_is_that_of_trl(sides, trl):
    """In version 1.16 it smooths one loss of sorted batches, which is DPO's for batches of one pair."""
    objective, losses = DPO(0.3, label_smoothing=0.1), []
    for i in range(PAIRS):
        policy, reference = (jax.tree.map(lambda x: jnp.full(PAIRS, x[i]), side) for side in sides)  # noqa: B023
        settings = {"loss_types": ["aot"], "beta": 0.3, "label_smoothing": 0.1}
        losses.append(theirs(trl, policy, reference, **settings)[0])
    np.testing.assert_allclose(objective.loss(*sides), losses, **TOLERANCE)


@pytest.mark.torch
@pytest.mark.parametrize("objective", [SimPO(2.0, 0.7), CPO(0.3, 0.0), CPO(0.3, 0.5), ORPO(0.4)], ids=str)
def test_losses_without_a_reference_are_those_of_trl(objective, sides, trl):
    """The cross entropy of chosen replies is added here, because trl's is a mean over the tokens of a batch, and in
    ORPO of the prompts too."""
    policy, torch = sides[0], trl.torch
    sums = torch.tensor(np.stack([policy.chosen, policy.rejected]), requires_grad=True)
    means = sums / torch.tensor(np.stack([policy.chosen_tokens, policy.rejected_tokens]))
    trainer = types.SimpleNamespace(accelerator=gathering(), alpha=0.0, label_smoothing=0.0, loss_type="sigmoid")
    trainer.beta = objective.weight if isinstance(objective, ORPO) else objective.beta
    if isinstance(objective, ORPO):
        losses = -trl.ORPO.odds_ratio_loss(trainer, *means)[0] - means[0]
    elif isinstance(objective, SimPO):
        trainer.loss_type, trainer.simpo_gamma = "simpo", objective.gamma
        losses = trl.CPO.cpo_loss(trainer, *means)[0]
    else:
        losses = trl.CPO.cpo_loss(trainer, *sums)[0] - objective.weight * means[0]
    losses.mean().backward()
    found, grad = ours(objective, *sides)
    np.testing.assert_allclose(found, losses.mean().item(), **TOLERANCE)
    np.testing.assert_allclose(grad, sums.grad.numpy(), **TOLERANCE)


def test_losses_are_those_that_torchtune_publishes():
    """Values of its tests/torchtune/rlhf/loss/test_dpo_loss.py (BSD-3)."""
    one = jnp.ones(3)
    policy = Replies(jnp.array([-0.5, -10.0, -1.0]), jnp.array([-0.1, -30.0, -21.0]), one, one)
    reference = Replies(jnp.array([-0.5, -10.1, -0.1]), jnp.array([-0.1, -20.1, -0.1]), one, one)
    np.testing.assert_allclose(DPO(0.1).loss(policy, reference), -np.log(1 / (1 + np.exp([0, -1, -2]))), **TOLERANCE)
    expected = np.log1p(np.exp([1.3, -39.5, -39.5]))
    np.testing.assert_allclose(SimPO(2.0, 0.5).loss(policy, reference), expected, **TOLERANCE)


def test_losses_are_those_of_maxtext(shared):
    """Golden steps of DPO: a loss and the margin that it belongs to, and the start at log 2."""
    golden = json.loads((shared / "reference" / "golden_dpo_correctness.json").read_text())
    for values in golden.values():
        for margin, loss in (("margin_step_1", "loss_step_1"), ("margin", "loss")):
            chosen = jnp.array([values[margin] / 0.1])
            pair, zero = Replies(chosen, 0 * chosen, chosen, chosen), Replies(0 * chosen, 0 * chosen, chosen, chosen)
            np.testing.assert_allclose(DPO(0.1).loss(pair, zero), [values[loss]], rtol=1e-6)
