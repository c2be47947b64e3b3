"""Embeddings over HTTP are those of the model, whoever else is in the request; models are loaded anew while it runs."""

import threading
import time

import httpx
import jax
import jax.numpy as jnp
import numpy as np
import openai
import pytest
from test_serve import TALK, Server, model

from gptjax.data.tokenizers.bytes import Bytes
from gptjax.models.encoder_model import EncoderModel
from gptjax.nn import EncoderConfig
from gptjax.serve.access import Policy
from gptjax.serve.keys import Keys
from gptjax.serve.service import Served

TEXTS = ["One text.", "Another one, which is longer than the first.", "Third"]


def encoder() -> EncoderModel:
    config = EncoderConfig(vocab=272, layers=1, width=16, heads=2)
    params = jax.jit(config.build().init)(jax.random.key(1), jnp.zeros((1, 4), jnp.int32))["params"]
    return EncoderModel(config, params, Bytes().build(iter(())))


def load():
    engine = model(1).engine(rows=4, page=16)
    engine.start()
    return {"tiny": Served(model(1), engine)}, {}


@pytest.fixture(scope="module")
def server():
    server = Server(policy=Policy(keys=Keys(others=["root"])), encoders={"encoder": encoder()}, load=load)
    yield server
    server.close()


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="root", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("name", ["encoder", "tiny"])
def test_embeddings_are_those_of_the_model(client, name):
    embedder = encoder() if name == "encoder" else model()
    expected = embedder.embed(TEXTS, batch=1)
    reply = client.embeddings.create(model=name, input=TEXTS)  # in base64, as the client asks for by itself
    assert np.array_equal(np.array([item.embedding for item in reply.data], np.float32), expected)
    plain = client.embeddings.create(model=name, input=TEXTS[1], encoding_format="float")
    assert np.array_equal(np.array(plain.data[0].embedding, np.float32), expected[1]), "alone as among others"
    assert reply.usage.prompt_tokens == sum(
        model().token_counts(TEXTS) if name == "tiny" else encoder().token_counts(TEXTS)
    )
    assert {m.id for m in client.models.list()} == {"tiny", "encoder"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": [1, 2]}, "input"),
        ({"input": "x" * 1_000, "model": "tiny"}, "input"),
        ({"input": "x", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "x", "dimensions": 3}, "dimensions"),
        ({"input": "x", "model": "gpt"}, "model"),
        ({}, "input"),
    ],
)
def test_mistakes_are_named(server, fields, param):
    reply = httpx.post(f"{server.url}/v1/embeddings", json=fields, headers={"authorization": "Bearer root"})
    assert (reply.status_code, reply.json()["error"]["param"]) == (404 if param == "model" else 400, param)


def wait(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_models_are_loaded_anew_without_dropping_a_request(server, client):
    asked = {"model": "tiny", "messages": TALK, "max_tokens": 150, "seed": 3}
    before = model(0).chat(TALK, max_tokens=150, seed=3).content
    after = model(1).chat(TALK, max_tokens=150, seed=3).content
    texts, stop, first = [], threading.Event(), server.engine

    def ask():
        while not stop.is_set():
            texts.append(client.chat.completions.create(**asked).choices[0].message.content)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait(lambda: before in texts)
    reply = httpx.post(f"{server.url}/admin/reload", json={}, headers={"authorization": "Bearer root"}, timeout=60)
    assert reply.json() == {"models": ["tiny"]}
    wait(lambda: after in texts)
    stop.set()
    for thread in threads:
        thread.join()
    assert set(texts) == {before, after}
    assert client.chat.completions.create(**asked).choices[0].message.content == after
    wait(lambda: first._closing)  # the former engine
