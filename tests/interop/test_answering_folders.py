"""Models for extractive question answering of `transformers`: what they compute we compute too, there and back."""

import jax
import numpy as np
import pytest
from family_cases import CASES, saved

from experiments import nanochat_hf
from gptjax.interop.huggingface import expressing, load_hf, read_kind, save_hf
from gptjax.nn import SpanExtractorConfig
from gptjax.objectives import SpanExtraction
from gptjax.types import AnswerSpans, UserError

FAMILIES = "bert", "roberta", "gpt2", "llama", "qwen3", "mistral", "falcon new"


@pytest.mark.sampled
@pytest.mark.torch
@pytest.mark.filterwarnings("default")  # theirs are not ours to mend
@pytest.mark.parametrize("case", FAMILIES)
def test_a_model_for_answers_of_transformers_goes_in_and_out(case, tmp_path):
    """Logits and the loss, with the types of tokens of a question and its passage where there are such."""
    family = case.split()[0]
    torch, auto, theirs = saved("AutoModelForQuestionAnswering", tmp_path / "theirs", family, **CASES[case])
    assert read_kind(tmp_path / "theirs") is SpanExtractorConfig
    config, params = load_hf(tmp_path / "theirs")
    assert isinstance(config, SpanExtractorConfig)
    tokens = np.random.default_rng(0).integers(3, 96, (1, 24))
    types, ones = np.arange(24)[None] // 10 % 2 * (family == "bert"), np.ones((1, 24), np.int32)
    inputs = {"input_ids": torch.tensor(tokens)}
    if family == "bert":
        inputs["token_type_ids"] = torch.tensor(types)
    with torch.inference_mode():
        out = theirs(**inputs, start_positions=torch.tensor([12]), end_positions=torch.tensor([15]))
        expected = np.stack([out.start_logits.numpy(), out.end_logits.numpy()], -1)
        apply = jax.jit(config.build().apply)
        logits = np.asarray(apply({"params": params}, tokens, token_types=types)[0])
        assert np.abs(logits - expected).max() / np.abs(expected).max() < 1e-4
        labels, positions = np.array([[10, 12, 15]]), np.arange(24)[None]
        batch = AnswerSpans(tokens, tokens, ones.astype(np.float32), ones, positions, labels)
        loss, weight = SpanExtraction()(lambda *_, **__: ((logits, None), {}), {}, batch)["loss"]
        assert float(loss / weight) == pytest.approx(float(out.loss), rel=1e-4)
        save_hf(tmp_path / "ours", config, params, model_type=family)
        again = auto.from_pretrained(tmp_path / "ours", attn_implementation="eager")
        assert type(again) is type(theirs)
        np.testing.assert_array_equal(again(**inputs).start_logits.numpy(), expected[..., 0])
    config_again, params_again = load_hf(tmp_path / "ours")
    assert config_again == config
    jax.tree.map(np.testing.assert_array_equal, params_again, params)


def test_a_family_without_such_a_class_is_refused():
    with pytest.raises(UserError, match="model for answers: got one, for which nanochat has no class in"):
        expressing(SpanExtractorConfig(nanochat_hf.experiment.model), "nanochat")
