"""Every field of generation_config.json is read, changes nothing, or is named in a warning."""

import json
import warnings

import pytest

from gptjax.inference.sampling import Sampling
from gptjax.interop.generation import of_sampling, read_sampling, read_stop_token_ids
from gptjax.types import UserError


def read(folder, **fields):
    """The sampling settings, and the warning or ""."""
    (folder / "generation_config.json").write_text(json.dumps(fields))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = read_sampling(folder)
    assert len(caught) <= 1
    return found, "".join(str(warning.message) for warning in caught)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"top_k": -1}, Sampling()),
        ({"top_k": 0, "top_p": 1.0}, Sampling(top_p=1.0)),
        ({"top_p": 0}, Sampling(top_k=1)),
        ({"top_p": 0.0, "top_k": 20, "temperature": 0.5}, Sampling(0.5, top_k=1)),
        ({"temperature": 0}, Sampling(temperature=0)),
        ({"max_new_tokens": 7, "num_beams": 1, "typical_p": 1.0, "no_repeat_ngram_size": 0}, Sampling()),
        ({"suppress_tokens": None, "bad_words_ids": [], "cache_implementation": "hybrid"}, Sampling()),
    ],
)
def test_what_can_be_is_read_without_a_word(tmp_path, fields, expected):
    found, warned = read(tmp_path, do_sample=True, **fields)
    assert found == expected
    assert not warned
    assert read(tmp_path, **of_sampling(expected)) == (expected, "")


@pytest.mark.parametrize("do_sample", [True, False, None])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("no_repeat_ngram_size", 3),
        ("suppress_tokens", [1, 2]),
        ("begin_suppress_tokens", [5]),
        ("min_new_tokens", 4),
        ("min_length", 4),
        ("bad_words_ids", [[3]]),
        ("num_beams", 4),
        ("typical_p", 0.5),
        ("forced_eos_token_id", 1),
        ("stop_strings", ["\n"]),
        ("something_of_the_future", 0.3),
    ],
)
def test_what_would_change_a_text_is_named(tmp_path, field, value, do_sample):
    found, warned = read(tmp_path, do_sample=do_sample, temperature=0.5, **{field: value})
    assert f"{field} {json.dumps(value)}" in warned
    assert found == {True: Sampling(0.5), False: Sampling(temperature=0), None: None}[do_sample]


@pytest.mark.parametrize(
    ("field", "value"), [("top_p", 1.5), ("temperature", -1), ("top_k", "all"), ("min_p", 2), ("repetition_penalty", 0)]
)
def test_what_cannot_be_is_named_and_the_rest_is_read(tmp_path, field, value):
    found, warned = read(tmp_path, **{"do_sample": True, "temperature": 0.5, field: value})
    assert f"{field} {json.dumps(value)}" in warned
    assert found == (Sampling() if field == "temperature" else Sampling(0.5))


def test_an_end_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert read_stop_token_ids(tmp_path, 8) == (7,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert read_stop_token_ids(tmp_path, 8) == (7, 9)
    with pytest.raises(UserError, match=r"^eos_token_id: got 7, 9 in .*, must be less than .* vocabulary of 7: no"):
        read_stop_token_ids(tmp_path, 7)


@pytest.mark.torch
@pytest.mark.filterwarnings("default")
def test_the_defaults_of_transformers_have_no_unknown_field(tmp_path):
    """Each of its fields, at the value that it takes by default, changes nothing."""
    transformers = pytest.importorskip("transformers", reason="compares with it: pip install -e '.[torch]'")
    config = transformers.GenerationConfig()
    defaults = getattr(config, "_get_default_generation_params", dict)()
    fields = json.loads(config.to_json_string(use_diff=False)) | json.loads(json.dumps(defaults))
    found, warned = read(tmp_path, **{**fields, "do_sample": True})
    assert not warned
    assert found == Sampling(top_k=50, top_p=1.0)
