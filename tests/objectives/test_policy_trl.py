"""Policy losses and their gradients equal those of trl's trainers on the same log-probabilities and advantages."""

import collections
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.objectives import DAPO, GRPO, GSPO, RLOO, DrGRPO, PolicyGradient
from gptjax.objectives.policy import PreparedEpisodes

B, T = 8, 10


@pytest.fixture(scope="module")
def trainers():
    pytest.importorskip("trl", reason="compares with trl: pip install -e '.[torch]'")
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.rloo_trainer import RLOOTrainer

    return types.SimpleNamespace(grpo=GRPOTrainer, rloo=RLOOTrainer)


def replies() -> tuple[np.ndarray, PreparedEpisodes]:
    """Log-probabilities now, and replies of all lengths with those before, of the sampler and of the reference."""
    draw = np.random.default_rng(0)
    weights = (np.arange(T) < draw.integers(1, T + 1, (B, 1))).astype(np.float32)
    now = (-draw.uniform(0.3, 3, (B, T))).astype(np.float32)
    old, sampler, reference = (now + draw.normal(size=(B, T)).astype(np.float32) * 0.2 for _ in range(3))
    old, sampler, reference = (np.minimum(x, -0.01) for x in (old, sampler, reference))
    whole, zeros = np.zeros((B, T), np.int32), np.zeros((B, T), np.float32)
    advantages = draw.normal(size=(B, 1)).astype(np.float32) * weights
    batch = PreparedEpisodes(
        whole, whole, weights, whole + 1, whole, sampler, whole, zeros[:, 0], whole[:, 0], zeros[:, 0] + 1,
        zeros[:, 0] + 1, old, reference, zeros, advantages, zeros,
    )  # fmt: skip
    return now, batch


def ours(objective, now, batch):
    """Loss and its gradient for the log-probabilities, which a model of two tokens has by itself."""

    def apply(variables, *_, **__):
        logprobs = variables["params"]
        return (jnp.stack([logprobs, jnp.log1p(-jnp.exp(logprobs))], -1), None), {}

    def loss(logprobs):
        total, weight = objective(apply, logprobs, batch)["loss"]
        return total / weight

    return jax.jit(jax.value_and_grad(loss))(now)


def theirs(trainer, now, batch, **settings):
    import torch

    logprobs = torch.tensor(now, requires_grad=True)
    tensor = lambda x: torch.tensor(np.asarray(x))  # noqa: E731
    mask = tensor(batch.weights)
    same = lambda x, **_: x  # noqa: E731
    arguments = {"delta": None, "use_bias_correction_kl": False, "steps_per_generation": 1}
    arguments |= {name: settings.pop(name) for name in arguments.keys() & settings.keys()}
    stand_in = types.SimpleNamespace(
        **{
            "_get_per_token_logps_and_entropies": lambda *_, **__: (logprobs, torch.zeros(B, T), None),
            "args": types.SimpleNamespace(**arguments), "aux_loss_enabled": False,
            "top_entropy_quantile": 1.0, "beta": 0.0,
            "off_policy_mask_threshold": None, "importance_sampling_level": "token", "loss_type": "grpo",
            "epsilon_low": 0.2, "epsilon_high": 0.2, "use_vllm": False, "vllm_importance_sampling_correction": True,
            "model": types.SimpleNamespace(training=True), "current_gradient_accumulation_steps": 1,
            "max_completion_length": T, "_entropy_bonus_enabled": False,
            "accelerator": types.SimpleNamespace(
                num_processes=1, gather=same, gather_for_metrics=same, reduce=same, sync_gradients=True
            ),
            "_metrics": {"train": collections.defaultdict(list)},
        } | settings
    )  # fmt: skip
    inputs = {
        "prompt_ids": torch.zeros(B, 1, dtype=torch.long), "prompt_mask": torch.ones(B, 1),
        "completion_ids": torch.zeros(B, T, dtype=torch.long), "completion_mask": mask,
        "advantages": tensor(batch.advantages[:, 0]), "old_per_token_logps": tensor(batch.old_logprobs),
        "ref_per_token_logps": tensor(batch.reference_logprobs), "num_items_in_batch": mask.sum(),
        "old_logps": (tensor(batch.old_logprobs) * mask).sum(1),
        "importance_sampling_ratio": torch.exp(tensor(batch.old_logprobs) - tensor(batch.logprobs)).clamp(max=1.1),
    }  # fmt: skip
    loss = trainer._compute_loss(stand_in, None, inputs)
    loss.backward()
    return loss.item(), logprobs.grad.numpy()


NONE = {"correction": "none"}
CASES = {
    "grpo": (GRPO(kl=0.04, **NONE), {"loss_type": "grpo", "beta": 0.04}),
    "unbiased divergence": (
        GRPO(kl=0.04, kl_estimator="weighted_k3", **NONE),
        {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": True},
    ),
    "dapo": (DAPO(**NONE), {"loss_type": "dapo", "epsilon_high": 0.28}),
    "bnpo": (PolicyGradient(**NONE), {"loss_type": "bnpo"}),
    "dr_grpo": (DrGRPO(max_tokens=12, **NONE), {"loss_type": "dr_grpo", "max_completion_length": 12}),
    "gspo": (
        GSPO(**NONE),
        {"importance_sampling_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4},
    ),
    "two-sided": (PolicyGradient(dual_clip=1.25, **NONE), {"loss_type": "bnpo", "delta": 1.25}),
    "token_truncate": (
        PolicyGradient(correction_cap=1.1),
        {"loss_type": "bnpo", "use_vllm": True},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_losses_are_trls(case, trainers):
    objective, settings = CASES[case]
    now, batch = replies()
    loss, gradient = ours(objective, now, batch)
    expected, expected_gradient = theirs(trainers.grpo, now, batch, **settings)
    assert float(loss) == pytest.approx(expected, abs=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-5)


def test_leave_one_out_is_trls(trainers):
    now, batch = replies()
    loss, gradient = ours(RLOO(kl=0, **NONE), now, batch)
    expected, expected_gradient = theirs(trainers.rloo, now, batch)
    assert float(loss) == pytest.approx(expected, abs=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-5)
