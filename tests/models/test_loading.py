"""Parameters are loaded with the requested sharding and dtype, from files of any format."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import gptjax
from gptjax.checkpoint.checkpoint import Checkpoints
from gptjax.cli.main import main
from gptjax.config import to_json
from gptjax.data.tokenizers.bytes import Bytes
from gptjax.distributed.parameters import flat
from gptjax.distributed.sharding import MeshConfig, ShardingRules
from gptjax.models import loading
from gptjax.models.language_model import LanguageModel
from gptjax.nn import Transformer, TransformerConfig
from gptjax.types import UserError

CONFIG = TransformerConfig(vocab=264, layers=2, width=16, heads=4, kv_heads=2, hidden=24)
TOKENIZER = Bytes().build(iter(()))
RULES = ShardingRules(embed="fsdp", heads="tensor", kv_heads="tensor", ffn="tensor", vocab="tensor")
TOKENS = np.asarray([[1, 2, 3], [7, 8, 9]])


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    """Its parameters are numbers that bfloat16 has too."""
    params = jax.jit(Transformer(CONFIG).init)(jax.random.key(0), TOKENS)["params"]
    params = jax.tree.map(lambda x: (10 * x).astype(jnp.bfloat16).astype(jnp.float32), params)
    return LanguageModel(CONFIG, params, TOKENIZER, context=64)


@pytest.fixture(scope="module")
def folders(model, tmp_path_factory):
    """Kind -> a folder of the model."""
    path = tmp_path_factory.mktemp("models")
    model.save(path / "saved")
    model.save_hf(path / "hf")
    model.save_hf(path / "hf bfloat16", "bfloat16")
    run = path / "run"
    TOKENIZER.save(run / "tokenizer")
    experiment = {"model": to_json(CONFIG), "stages": {"train": {"data": {"length": 64}}}}
    (run / "config.json").write_text(json.dumps({"experiment": experiment}))
    with Checkpoints(run / "checkpoints" / "train") as checkpoints:
        checkpoints.save(1, {"params": model.params}, {"tokenizer": TOKENIZER.fingerprint})
    return {name: path / name for name in ("saved", "hf", "hf bfloat16", "run")}


KINDS = pytest.mark.parametrize("kind", ["saved", "hf", "hf bfloat16", "run"])


@pytest.mark.sampled
@KINDS
def test_parameters_are_sharded_over_the_devices_and_compute_the_same(model, folders, kind):
    before, text = model.logits(TOKENS), model.generate("hello", 8, temperature=0)[0].text
    with jax.set_mesh(MeshConfig(data=2, fsdp=2, tensor=2).make()):
        lm = gptjax.load(folders[kind], "float32", RULES)
        q, embedding = lm.params["blocks"]["attention"]["q"], lm.params["embedding"]
        assert q.sharding.spec == PartitionSpec(None, "fsdp", "tensor", None)
        assert embedding.addressable_shards[0].data.shape == (264 // 2, 16 // 2)
        assert lm.context == 64
        jax.tree.map(np.testing.assert_array_equal, lm.params, model.params)
        # Sums in another order, of 24 terms at most, through 2 layers.
        np.testing.assert_allclose(lm.logits(TOKENS), before, rtol=1e-5, atol=1e-5 * np.abs(before).max())
        assert lm.generate("hello", 8, temperature=0)[0].text == text


@KINDS
def test_one_place_decides_the_class_and_is_asked_once(folders, kind, monkeypatch):
    asked, decide = [], loading.model_class
    monkeypatch.setattr(loading, "model_class", lambda config: asked.append(config) or decide(config))
    found = gptjax.load(folders[kind], kind=loading.Model)
    assert asked == [TransformerConfig]
    assert type(found) is LanguageModel
    monkeypatch.setattr(loading, "model_class", lambda _: Own)
    assert type(gptjax.load(folders[kind], kind=Own)) is Own


class Own(LanguageModel):
    """A class that nothing in loading knows of."""


@KINDS
def test_the_dtype_is_the_files_own_or_the_one_asked_for(model, folders, kind):
    for dtype in (None, "float32", "bfloat16"):
        want = dtype or ("bfloat16" if kind == "hf bfloat16" else "float32")
        lm = gptjax.load(folders[kind], dtype)
        assert {x.dtype for x in flat(lm.params).values()} == {jnp.dtype(want)}
        assert lm.config.dtype == want
        assert lm.logits(TOKENS).dtype == want
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(x.astype(y.dtype), y), lm.params, model.params)
    with pytest.raises(UserError, match=r"^dtype: got 'float8', must be float32 or bfloat16 \(default: that of"):
        gptjax.load(folders[kind], "float8")


def test_a_model_of_bfloat16_is_saved_as_it_is(folders, tmp_path):
    lm = gptjax.load(folders["hf bfloat16"])
    lm.save(tmp_path / "again")
    again = gptjax.load(tmp_path / "again")
    assert again.config.dtype == "bfloat16"
    np.testing.assert_array_equal(again.logits(TOKENS), lm.logits(TOKENS))


def test_a_configuration_that_is_not_as_it_was_saved_is_refused(folders, tmp_path):
    """One bit of it, anywhere."""
    shutil.copytree(folders["saved"], tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    content = path.read_bytes()
    for at, bit in np.random.default_rng(0).integers([0, 0], [len(content), 8], (200, 2)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
        try:
            if json.loads(path.read_bytes()) == json.loads(content):  # another white space
                continue
        except ValueError:
            pass
        with pytest.raises(UserError, match=r"^path: got .*, whose config\.json (is damaged|is not as it|has an unk)"):
            gptjax.load(path.parent)
    path.write_bytes(content)
    gptjax.load(path.parent)


def test_a_run_is_loaded_at_the_step_that_is_asked_for(model, folders, tmp_path):
    """The newest, the one of the lowest validation loss, or any that is kept; by the command line too."""
    folder = shutil.copytree(folders["run"], tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    with Checkpoints(folder / "checkpoints" / "train", max_to_keep=2) as checkpoints:
        for step, loss in ((1, 3.0), (2, 2.0), (3, None), (4, 2.5)):
            params = jax.tree.map(lambda x, step=step: x + step, model.params)
            checkpoints.save(step, {"params": params}, {"tokenizer": TOKENIZER.fingerprint}, loss)

    def step_of(found: LanguageModel) -> float:
        return float(found.params["embedding"][0, 0] - model.params["embedding"][0, 0])

    for step, expected in (("latest", 4), ("best", 2), (3, 3)):
        assert step_of(gptjax.load(folder, step=step)) == expected
    with pytest.raises(UserError, match=r"^step: got 1, must be one that .* has: 2, 3, 4, latest or best \(2\)"):
        gptjax.load(folder, step=1)
    with pytest.raises(UserError, match=r"^step: got best for .*saved, must be latest: only a run has several"):
        gptjax.load(folders["saved"], step="best")
    assert main(["convert", str(folder), str(tmp_path / "best"), "--to", "gptjax", "--step", "best"]) == 0
    assert step_of(gptjax.load(tmp_path / "best")) == 2
    assert main(["generate", str(folder), "--prompt", "a", "--max-tokens", "1", "--step", "9"]) == 2
