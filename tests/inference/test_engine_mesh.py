"""On a mesh of devices the engine writes what it writes on one device."""

import dataclasses

import numpy as np
import pytest
from test_engine import TOKENIZER, requests, same, write
from test_mesh import CONFIGS, SIZES, on_mesh, params_of

from gptjax.distributed.sharding import DEFAULT_RULES, MeshConfig
from gptjax.inference.engine import Engine, Heads, NGram
from gptjax.nn import LSTM, LayerOverrides, MultiTokenConfig

HYBRID = MultiTokenConfig(
    **{**SIZES, "layers": 2}, ahead=2, pattern=(LayerOverrides(), LayerOverrides(attention=LSTM()))
)


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("name", "mesh", "draft"),
    [
        ("grouped", MeshConfig(data=2, fsdp=2, tensor=2), None),
        ("grouped", MeshConfig(data=2, tensor=4), NGram(3)),  # more parts than key heads
        ("experts", MeshConfig(data=4, tensor=2), None),
        ("latent", MeshConfig(data=2, fsdp=2, tensor=2), None),
        ("hybrid", MeshConfig(data=2, fsdp=2, tensor=2), Heads(2)),
    ],
)
def test_a_mesh_changes_no_token(name, mesh, draft):
    """And a text has the bits there that it has alone."""
    config, options = (
        HYBRID if name == "hybrid" else CONFIGS[name],
        {"rows": 4, "context": 128, "page": 16, "draft": draft},
    )
    asked = [dataclasses.replace(request, prompt_logprobs=i == 2) for i, request in enumerate(requests(6))]
    expected = write(Engine(config.build(), params_of(config), TOKENIZER, **options), asked)
    shared = Engine(config.build(DEFAULT_RULES), on_mesh(config, mesh), TOKENIZER, **options)
    found = write(shared, asked)
    for one, other in zip(expected, found, strict=True):
        assert [token.id for token in one.tokens] == [token.id for token in other.tokens]
        for a, b in ((one.tokens, other.tokens), (one.prompt, other.prompt)):
            np.testing.assert_allclose([t.logprob for t in a], [t.logprob for t in b], atol=1e-4)
    same(found[1], *write(shared, asked[1:2]))
