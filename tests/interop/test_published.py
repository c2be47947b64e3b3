"""The config.json of published models, with their older words and with what they leave out, is read as it is meant."""

import math

import pytest
from published_configs import LONG, PUBLISHED

from gptjax.distributed.parameters import declared
from gptjax.interop.families import FAMILIES, Fields
from gptjax.interop.multimodal import text_fields
from gptjax.nn import (
    ALiBi,
    EncoderDecoderConfig,
    LearnedPositions,
    LinearScaling,
    Llama3Scaling,
    LongRoPE,
    Positions,
    RoPE,
    T5Bias,
    YaRN,
)

Layers = list[tuple[int | None, Positions]]
"""The window and the positions of the first few layers; the others repeat them."""
LONGROPE = LongRoPE((1.0,) * 48, tuple(LONG), original_length=4096, factor=32.0, length=4096)
EXPECTED: dict[str, tuple[int, int, bool, Layers]] = {
    "meta-llama/Llama-3.2-1B": (1_235_814_400, 64, True, [(None, RoPE(5e5, Llama3Scaling(32.0, 1.0, 4.0, 8192)))]),
    "Qwen/Qwen2.5-0.5B": (494_032_768, 64, True, [(None, RoPE(1e6))]),
    "Qwen/Qwen3-0.6B": (596_049_920, 128, True, [(None, RoPE(1e6))]),
    "Qwen/Qwen3-30B-A3B": (30_532_122_624, 128, False, [(None, RoPE(1e6))]),
    "google/gemma-2-2b": (2_614_341_888, 256, True, [(4096, RoPE()), (None, RoPE())]),
    "google/gemma-3-1b-it": (999_885_952, 256, True, [*[(512, RoPE())] * 5, (None, RoPE(1e6))]),
    "google/gemma-3-4b-it": (
        3_880_263_168, 256, True, [*[(1024, RoPE())] * 5, (None, RoPE(1e6, LinearScaling(8.0)))]
    ),
    "microsoft/Phi-3-mini-4k-instruct": (3_821_079_552, 96, False, [(2047, RoPE())]),
    "microsoft/Phi-4-mini-instruct": (3_836_021_760, 128, True, [(262_144, RoPE(1e4, LONGROPE, fraction=0.75))]),
    "microsoft/phi-4": (14_659_507_200, 128, False, [(None, RoPE(2.5e5))]),
    "google/gemma-2b": (2_506_172_416, 256, True, [(None, RoPE())]),
    "allenai/Olmo-3-7B-Instruct": (
        7_298_011_136, 128, False,
        [*[(4096, RoPE(5e5))] * 3, (None, RoPE(5e5, YaRN(8.0, 8192, attention_factor=1.2079441541679836)))],
    ),
    "HuggingFaceTB/SmolLM3-3B": (3_075_098_624, 128, True, [*[(None, RoPE(5e6))] * 3, (None, Positions())]),
    "ibm-granite/granite-3.1-2b-instruct": (2_533_531_648, 64, True, [(None, RoPE(5e6))]),
    "CohereForAI/c4ai-command-r-plus": (103_810_674_688, 128, True, [(None, RoPE(7.5e7, interleaved=True))]),
    "CohereForAI/c4ai-command-r7b-12-2024": (
        8_028_033_024, 128, True, [*[(4096, RoPE(5e4, interleaved=True))] * 3, (None, Positions())]
    ),
    "stabilityai/stablelm-3b-4e1t": (2_795_443_200, 80, False, [(None, RoPE(fraction=0.25))]),
    "allenai/OLMo-2-0425-1B": (1_484_916_736, 128, False, [(None, RoPE(5e5))]),
    "mistralai/Mistral-7B-v0.1": (7_241_732_096, 128, False, [(4096, RoPE())]),
    "mistralai/Mistral-7B-v0.3": (7_248_023_552, 128, False, [(None, RoPE(1e6))]),
    "mistralai/Mixtral-8x7B-v0.1": (46_702_792_704, 128, False, [(None, RoPE(1e6))]),
    "bigcode/starcoder2-3b": (3_030_371_328, 128, True, [(4096, RoPE(999999.4420358813))]),
    "tiiuae/falcon-7b": (6_921_720_704, 64, True, [(None, RoPE())]),
    "bigscience/bloom-560m": (559_214_592, 64, True, [(None, ALiBi())]),
    "EleutherAI/pythia-160m": (162_322_944, 64, False, [(None, RoPE(fraction=0.25))]),
    "openai-community/gpt2": (124_439_808, 64, True, [(None, LearnedPositions(1024))]),
    "deepseek-ai/DeepSeek-V3": (
        671_026_419_200, 128, False, [(None, RoPE(1e4, YaRN(40, 4096, mscale=1, mscale_all_dim=1), interleaved=True))]
    ),
    "openai/gpt-oss-20b": (
        20_914_757_184, 64, False, [(size, RoPE(1.5e5, YaRN(32.0, 4096, truncate=False))) for size in (128, None)]
    ),
    "google-bert/bert-base-uncased": (109_514_298, 64, True, [(None, LearnedPositions(512))]),
    "FacebookAI/roberta-base": (124_697_433, 64, True, [(None, LearnedPositions(512, offset=2))]),
    "answerdotai/ModernBERT-base": (149_655_232, 64, True, [(None, RoPE(1.6e5)), (65, RoPE()), (65, RoPE())]),
    "google/flan-t5-small": (76_961_152, 64, False, [(None, T5Bias(32, 128))]),
}  # fmt: skip
"""Parameters in all, as their authors count them; the size of a head; whether the head is tied; the layers."""


@pytest.mark.sampled
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_is_the_one_its_authors_mean(name):
    fields = Fields(text_fields(PUBLISHED[name]))
    family = next(family for family in FAMILIES if family.model_type == fields["model_type"])
    config = family.read(family.named(fields))
    parameters, head_size, tied, layers = EXPECTED[name]
    assert sum(math.prod(x.shape) for x in declared(config.build()).values()) == parameters
    model = config.decoder if isinstance(config, EncoderDecoderConfig) else config
    assert (model.H, model.tie_embeddings) == (head_size, tied)
    blocks = model.stack().blocks
    found = [(block.attention.window, block.attention.positions or model.positions) for block in blocks]
    assert found == (layers * len(blocks))[: len(blocks)]


def test_the_scales_of_published_scores():
    """Gemma 3's and DeepSeek-V3's, which their fields say in words of their own."""

    def scale(name: str) -> float:
        c = Fields(text_fields(PUBLISHED[name]))
        return next(f for f in FAMILIES if f.model_type == c["model_type"]).read(c).attention.scale

    assert scale("google/gemma-3-4b-it") == 256**-0.5
    longer = 0.1 * math.log(40) + 1
    assert scale("deepseek-ai/DeepSeek-V3") == pytest.approx((128 + 64) ** -0.5 * longer**2, rel=1e-12)
