"""Adapters as models of their own, over HTTP."""

import jax
import jax.numpy as jnp
import numpy as np
from starlette.testclient import TestClient
from test_serve import TALK, model

from gptjax.distributed.parameters import parameter_info
from gptjax.interop import peft
from gptjax.nn import LoRA
from gptjax.serve.access import Policy
from gptjax.serve.app import make_app
from gptjax.serve.service import Served


def test_an_adapter_is_a_model_without_a_copy(tmp_path):
    lm, lora = model(), LoRA(4, match=("attention/q", "attention/o"))
    leaves, tree = jax.tree.flatten(lora.init(jax.random.key(0), lm.params, parameter_info(lm.config.build())))
    numpy = np.random.default_rng(0)
    factors = jax.tree.unflatten(tree, [jnp.asarray(numpy.normal(0, 0.3, x.shape), jnp.float32) for x in leaves])
    peft.write(tmp_path / "pirate", lora, factors, lm.config)
    engine = lm.engine(rows=4, page=16, adapters={"pirate": tmp_path / "pirate"})
    engine.start()
    served = {"tiny": Served(lm, engine), "pirate": Served(lm, engine, adapter="pirate")}
    said = {}
    with TestClient(make_app(served, Policy(hosts=None))) as client:
        assert [one["id"] for one in client.get("/v1/models").json()["data"]] == list(served)
        for name in served:
            body = {"model": name, "messages": TALK, "max_tokens": 20, "temperature": 0}
            said[name] = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
        refused = client.post("/v1/embeddings", json={"model": "pirate", "input": "a"})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "model")
        assert client.get("/metrics").text.count("\ngptjax_tokens_written_total{") == 1
    assert said["tiny"] == lm.chat(TALK, max_tokens=20, temperature=0).content
    assert said["pirate"] == lm.with_adapter(tmp_path / "pirate").chat(TALK, max_tokens=20, temperature=0).content
    assert said["pirate"] != said["tiny"]
