"""Fields of the wrong type and sizes that the files cannot hold are refused where they come in, in one line."""

import json
import os
import re

import jax
import numpy as np
import pytest

from gptjax.interop.huggingface import from_tensors, load_hf, save_hf
from gptjax.interop.peft_fields import AdapterFields
from gptjax.interop.safetensors import Tensors
from gptjax.interop.schema import FILES, read_fields
from gptjax.io.json_file import FLAG, NATURAL, TEXT, check, read_object
from gptjax.nn import TransformerConfig
from gptjax.types import UserError

WRONG = ({}, [], [{}], "x", 1.5, True, -3, 2**63, 10**400, float("nan"), [1], {"x": [None]})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = TransformerConfig(vocab=32, layers=2, width=16, heads=2)
    model = config.build()
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
    folder = tmp_path_factory.mktemp("schema") / "model"
    save_hf(folder, config, jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes))
    return folder


def test_a_check_names_the_place():
    schema = {"a": TEXT, "b": [NATURAL], "c": {"*": (FLAG, {"d": TEXT})}}
    check({"a": None, "b": [1, 2], "c": {"x": True, "y": {"d": "e"}}, "z": object()}, schema, "file")
    for wrong, message in (
        ({"a": 1}, "file: a: got 1, must be text"),
        ({"b": 1}, "file: b: got 1, must be a list"),
        ({"b": [1, None]}, "file: b: 1: got null, must be an integer from 0 to 2^31 - 1"),
        ({"b": [1, True]}, "file: b: 1: got True, must be an integer from 0 to 2^31 - 1"),
        ({"c": {"x": 5}}, "file: c: x: got 5, must be true or false or an object"),
        ({"c": {"x": {"d": 10**400}}}, "file: c: x: got {'d': 1000"),
    ):
        with pytest.raises(UserError, match=f"^{re.escape(message)}"):
            check(wrong, schema, "file")


@pytest.mark.sampled
@pytest.mark.parametrize("name", FILES)
def test_every_field_of_every_file_refuses_what_is_not_of_its_type(name, folder, tmp_path):
    """Read or refused by name, never another exception."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    fields = json.loads((tmp_path / name).read_text()) if (tmp_path / name).exists() else {}
    fields |= {"r": 4, "lora_alpha": 8, "peft_type": "LORA"} if name == "adapter_config.json" else {}
    readers = {"config.json": load_hf, "adapter_config.json": AdapterFields}
    read = readers.get(name, lambda folder: read_fields(folder / name))
    refused = 0
    for field in ({*FILES[name]} | {"rope_parameters", "rope_scaling", "x"}) - {"*"}:
        for value in WRONG if name != "config.json" else WRONG[::2]:
            (tmp_path / name).write_text(json.dumps({**fields, field: value}))
            message = ""
            try:
                read(tmp_path)
            except UserError as error:
                message = str(error)
            assert "\n" not in message
            refused += bool(message)
    assert refused > len(FILES[name])


@pytest.mark.parametrize(
    ("field", "size"),
    [("num_hidden_layers", 1_000_000), ("hidden_size", 100_000), ("vocab_size", 2**31 - 1), ("head_dim", 2**30)],
)
def test_a_size_that_the_tensors_cannot_hold_is_refused_before_anything_is_made(field, size, folder, monkeypatch):
    monkeypatch.setattr("gptjax.interop.huggingface.declared", lambda _: pytest.fail("described the model"))
    fields = json.loads((folder / "config.json").read_text()) | {field: size}
    with pytest.raises(UserError, match=rf"^config.json: {field}: got {size}, which is more than the file has"):
        from_tensors(fields, Tensors(folder))


def test_files_that_are_no_json_of_ours(tmp_path):
    path = tmp_path / "config.json"
    for content, reason in (
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": "\xff"}', "invalid start byte"),
        ('{"a": 1}'.encode("utf-16"), "invalid start byte"),
        (b"[]", "not a JSON object"),
        (b'{"a": 1' + b"0" * 5_000 + b"}", "Exceeds the limit"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=reason):
            read_object(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="not a regular file"):
        read_object(path)
