"""A model goes to disk and comes back the same; what does not belong together is refused with one line."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.checkpoint.checkpoint import Checkpoints
from gptjax.config import to_json
from gptjax.data.chat import Message, conversation
from gptjax.data.tokenizers.bytes import Bytes
from gptjax.inference import Sampling
from gptjax.interop import tokenizers
from gptjax.models import language_model
from gptjax.models.language_model import LanguageModel
from gptjax.models.loading import load
from gptjax.nn import Backbone, Last, LearnedPositions, Mean, Positions, RoPE, Transformer, TransformerConfig
from gptjax.types import UserError

TOKENIZER = Bytes().build(iter(()))


def make(positions: Positions = RoPE(), context: int | None = None) -> LanguageModel:
    config = TransformerConfig(vocab=264, layers=2, width=16, heads=2, positions=positions)
    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    numpy = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(numpy.normal(0, 0.3, x.shape), jnp.float32), shapes)
    return LanguageModel(config, params, TOKENIZER, context)


LM = make()


def test_saved_and_loaded_it_computes_the_same(tmp_path):
    tokens = np.asarray([[1, 2, 3], [7, 8, 9]])
    before = LM.logits(tokens)
    assert before.shape == (2, 3, 264)
    dataclasses.replace(LM, context=77).save(tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert loaded.config == LM.config
    assert loaded.context == 77
    assert loaded.tokenizer.fingerprint == TOKENIZER.fingerprint
    np.testing.assert_array_equal(loaded.logits(tokens), before)
    with pytest.raises(UserError, match=r"model, which exists; "):
        LM.save(tmp_path / "model")


@pytest.mark.parametrize("pooling", [Last(), Mean()])
def test_vectors_are_of_the_texts_own_states(pooling):
    """Each as long as 1, whatever is beside it in a batch."""
    texts = ["a", "some words", "b c"]
    vectors = LM.embed(texts, pooling=pooling, batch=2)
    for text, vector in zip(texts, vectors, strict=True):
        ids = [i for i in (TOKENIZER.bos, *TOKENIZER.encode(text), TOKENIZER.eos) if i is not None]
        x, _ = Backbone(LM.config).apply({"params": LM.params}, jnp.asarray([ids]))
        pooled = x[0, -1] if pooling == Last() else x[0].mean(0)
        # float32 sums of 16 products in 2 layers, in another order.
        np.testing.assert_allclose(vector, pooled / jnp.linalg.norm(pooled), rtol=1e-4, atol=1e-5)


def test_a_folder_for_transformers_is_the_same_model(tmp_path):
    dataclasses.replace(LM, context=77).save_hf(tmp_path / "model")
    loaded = load(tmp_path / "model")
    tokens = np.asarray([[1, 2, 3], [7, 8, 9]])
    np.testing.assert_array_equal(loaded.logits(tokens), LM.logits(tokens))
    assert loaded.context == 77
    assert loaded.tokenizer.encode("é, a text") == TOKENIZER.encode("é, a text")
    messages = [Message("user", "hello")]
    assert loaded.chat(messages, 12, temperature=0) == LM.chat(messages, 12, temperature=0)


def test_a_folders_tokens_beyond_the_model_are_left_out(tmp_path):
    """Gemma 3's first has one for images, and fine-tuned ones have a pad token more."""
    LM.save_hf(tmp_path / "model")
    more = TOKENIZER.with_specials([f"<|{i}|>" for i in range(LM.config.vocab)])
    tokenizers.save(more, tmp_path / "model", context=64)
    loaded = load(tmp_path / "model")
    assert loaded.tokenizer.vocab == LM.config.vocab
    assert "<|0|>" in loaded.tokenizer.specials
    assert loaded.tokenizer.encode("<|200|>") == TOKENIZER.encode("<|200|>")


def test_a_text_ends_where_the_model_says(tmp_path):
    whole = dataclasses.replace(LM, stop_token_ids=()).generate("hello", 12, temperature=0)[0]
    assert len(whole.ids) == 12
    end = whole.ids[5]
    lm = dataclasses.replace(LM, stop_token_ids=(end, TOKENIZER.eos))
    lm.save(tmp_path / "ours")
    lm.save_hf(tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"] == [*lm.stop_token_ids]
    for model in (lm, load(tmp_path / "ours"), load(tmp_path / "hf")):
        assert model.stop_token_ids == lm.stop_token_ids
        (completion,) = model.generate("hello", 12, temperature=0)
        assert completion.ids == whole.ids[: whole.ids.index(end) + 1]
        assert completion.finish == "stop"
        assert "".join(model.stream("hello", 12, temperature=0)) == completion.text
    (tmp_path / "hf" / "generation_config.json").unlink()
    assert load(tmp_path / "hf").stop_token_ids == (TOKENIZER.eos,), "config.json says it too"
    LM.save_hf(tmp_path / "any special")
    assert set(load(tmp_path / "any special").stop_token_ids) == set(TOKENIZER.specials.values())


def test_text_is_drawn_as_a_folder_says(tmp_path):
    LM.save_hf(tmp_path / "model")
    assert load(tmp_path / "model").sampling is None, "ours don't say"
    file = tmp_path / "model" / "generation_config.json"
    fields = json.loads(file.read_text())
    usual = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "transformers_version": "4.51.0"}
    greedy = Sampling(temperature=0)
    for said, want in (
        (usual, Sampling(0.7, 20, 0.9)),
        ({**usual, "top_k": 0, "top_p": None, "repetition_penalty": 1.1}, Sampling(0.7, repetition_penalty=1.1)),
        ({**usual, "do_sample": False}, greedy),
    ):
        file.write_text(json.dumps({**fields, **said}))
        lm = load(tmp_path / "model")
        assert lm.sampling == want
        assert lm.generate("hello", 12) == LM.generate("hello", 12, sampling=want)
        assert "".join(lm.stream("hello", 12)) == lm.generate("hello", 12)[0].text
        assert lm.generate("hello", 12, temperature=0) == lm.generate(
            "hello", 12, sampling=dataclasses.replace(want, temperature=0)
        )
        lm.save(tmp_path / str(want) / "ours")
        lm.save_hf(tmp_path / str(want) / "hf")
        assert {load(path).sampling for path in (tmp_path / str(want)).iterdir()} == {want}
        written = json.loads((tmp_path / str(want) / "hf" / "generation_config.json").read_text())
        assert written.get("top_k", 0) == (want.top_k or 0)
        assert ("top_k" in written) is written["do_sample"], "transformers would take 50"


def test_logprobs_are_those_of_the_logits():
    text = "a text, é"
    ids = [TOKENIZER.bos, *TOKENIZER.encode(text)]
    want = jax.nn.log_softmax(LM.logits([ids]))[0, np.arange(len(ids) - 1), jnp.asarray(ids[1:])]
    np.testing.assert_allclose(LM.logprobs(text), want, atol=1e-5)
    np.testing.assert_allclose(LM.logprobs(ids), want, atol=1e-5)
    assert LM.logprobs("").shape == (0,)
    with pytest.raises(UserError, match=r"^tokens: got 41, must be at most 40"):
        make(LearnedPositions(40)).logprobs("x" * 40)


@pytest.mark.parametrize("ids", [[-1, 3], [3, 264], [0.5, 1.0]])
def test_ids_outside_of_the_vocabulary_are_refused(ids):
    with pytest.raises(UserError, match=r"^tokens: got (float64|ids .*), must be"):
        LM.logits([ids])
    with pytest.raises(UserError, match=r"^tokens: got (float64|ids .*), must be"):
        LM.logprobs(ids)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_beyond_32_bits_are_refused(seed):
    with pytest.raises(UserError, match=f"^seed: got {seed}, must be 0 to {2**32 - 1}"):
        LM.generate("a", max_tokens=1, seed=seed)


def test_generated_logprobs_are_those_of_the_text():
    (completion,) = LM.generate("hello", 12, temperature=0)
    prompt = [TOKENIZER.bos, *TOKENIZER.encode("hello")]
    ids = [*prompt, *completion.ids]
    np.testing.assert_allclose(LM.logprobs(ids)[len(prompt) - 1 :], completion.logprobs, atol=0.05)
    assert "".join(LM.stream("hello", 12, temperature=0)) == completion.text


def test_chat_answers_after_the_assistant_marker():
    messages = [{"role": "user", "content": "hello"}]
    answer = LM.chat(messages, 12, temperature=0)
    assert answer.role == "assistant"
    assert answer.content == "".join(LM.stream_chat([Message("user", "hello")], 12, temperature=0))


def test_a_reply_is_a_message_with_calls_and_reasoning(monkeypatch):
    text = 'Hm.</think>\n\nSo.<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    monkeypatch.setattr(language_model, "generate", lambda *args, **options: [SimpleNamespace(text="<think>" + text)])
    tools = [{"type": "function", "function": {"name": "add"}}]
    reply = LM.chat([Message("user", "1?")], tools=tools)
    (call,) = reply.tool_calls
    assert (reply.content, reply.fields) == ("So.", {"reasoning_content": "Hm."})
    assert call["function"] == {"name": "add", "arguments": '{"a": 1}'}
    assert LM.chat([Message("user", "1?")]).content == text.partition("\n\n")[2]
    talk = [Message("user", "1?"), reply, Message("tool", "2", fields={"tool_call_id": call["id"]})]
    assert "<tool_call>" in LM.tokenizer.decode(LM.encode_chat(talk))
    lm = dataclasses.replace(LM, context=500)
    kept, dropped = lm.trim(conversation([*talk, Message("assistant", "x" * 40), Message("user", "2?")], tools))
    assert (len(kept), dropped, [*kept[0].tools]) == (1, 4, tools), "a call goes with its result, and tools stay"


def test_long_conversations_lose_their_oldest_messages_but_not_the_system_message():
    lm = dataclasses.replace(LM, context=60)  # every message costs its bytes and two markers
    turns = [Message(role, f"{i}" * 8) for i in range(3) for role in ("user", "assistant")]
    messages = [Message("system", "s"), *turns, Message("user", "last")]
    kept, dropped = lm.trim(messages, max_tokens=20)
    assert kept == [messages[0], *messages[5:]]
    assert dropped == 4
    assert lm.trim(messages, max_tokens=5) == ([messages[0], *messages[3:]], 2)
    assert LM.trim(messages)[1] == 0
    assert lm.chat(messages, max_tokens=20, temperature=0) == lm.chat(kept, max_tokens=20, temperature=0)
    with pytest.raises(UserError, match=r"^messages: got 54 tokens that cannot be dropped, must be at most 30 "):
        lm.trim([Message("user", "x" * 50)])
    with pytest.raises(UserError, match=r"^messages: got none"):
        lm.trim([])


def test_a_run_folder_gives_its_last_trained_stage(tmp_path):
    stage = {"data": {"length": 48}}
    experiment = {"model": to_json(LM.config), "stages": {"pretrain": stage, "chat": stage}}
    (tmp_path / "config.json").write_text(json.dumps({"experiment": experiment}))
    TOKENIZER.save(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="a run without a checkpoint"):
        load(tmp_path)
    with Checkpoints(tmp_path / "checkpoints" / "pretrain") as checkpoints:
        checkpoints.save(3, {"params": LM.params}, {"tokenizer": TOKENIZER.fingerprint})
    lm = load(tmp_path)
    assert lm.context == 48
    jax.tree.map(np.testing.assert_array_equal, lm.params, LM.params)
    other = jax.tree.map(lambda x: x + 1, LM.params)
    with Checkpoints(tmp_path / "checkpoints" / "chat") as checkpoints:
        checkpoints.save(5, {"params": other}, {"tokenizer": "another"})
    with pytest.raises(UserError, match="whose tokenizer is not the one the model was trained with"):
        load(tmp_path)


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"^path: got .*nowhere, must be a folder or a hub repository"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"^path: got .*, which has no config.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="whose weights are pickles"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"mod')
    with pytest.raises(UserError, match=r"whose config.json is damaged"):
        load(tmp_path)
    LM.save(tmp_path / "model")
    params = tmp_path / "model" / "params.npz"
    data = bytearray(params.read_bytes())
    data[len(data) // 2] ^= 1
    params.write_bytes(data)
    with pytest.raises(UserError, match=r"whose params.npz is missing or damaged"):
        load(tmp_path / "model")


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"^tokenizer: got one of 267 ids, must be at most 264"):
        dataclasses.replace(LM, tokenizer=TOKENIZER.with_specials([f"<|{i}|>" for i in range(6)]))
    with pytest.raises(UserError, match=r"^params: got blocks/attention/k of shape .*, must be "):
        dataclasses.replace(LM, config=dataclasses.replace(LM.config, kv_heads=1))
