"""Regular expressions of a tokenizer.json: those that backtrack without end are refused when it is loaded."""

import json
import time

import pytest

from gptjax.data.tokenizers import load_tokenizer
from gptjax.types import UserError

tokenizers = pytest.importorskip("tokenizers")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
)


def write(folder, pattern, part="pre_tokenizer"):
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE({c: i for i, c in enumerate(tokenizers.pre_tokenizers.ByteLevel.alphabet())}, [])
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    spec = json.loads(made.to_str())
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    if part == "normalizer":
        spec[part] = {"type": "Replace", "pattern": {"Regex": pattern}, "content": "x"}
    else:
        spec[part] = {"type": "Sequence", "pretokenizers": [step, spec[part]]}
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return folder


@pytest.mark.parametrize("pattern", [GPT2, LLAMA3, DEEPSEEK, r"\s+$", r"\p{N}{1,3}(?=(?:\p{N}{3})*\b)"])
def test_patterns_of_published_models_are_read(tmp_path, pattern):
    tokenizer = load_tokenizer(write(tmp_path / "a", pattern) / "tokenizer.json")
    assert tokenizer.decode(tokenizer.encode("It's 12 é!\n\n x")) == "It's 12 é!\n\n x"


@pytest.mark.parametrize("part", ["pre_tokenizer", "normalizer"])
@pytest.mark.parametrize("pattern", [r"(a+)+$", r"(\s|\s)*$", r"(q+)+z", r"(\p{L}*)*\d*(\p{L}*)*$", r"a*a*a*a*a*$"])
def test_patterns_without_end_are_refused(tmp_path, pattern, part):
    begin = time.monotonic()
    with pytest.raises(
        UserError, match=rf"^tokenizer: got a tokenizer\.json whose {part} has the regular exp"
    ) as error:
        load_tokenizer(write(tmp_path / "a", pattern, part) / "tokenizer.json")
    assert "\n" not in str(error.value)
    assert time.monotonic() - begin < 15


def test_a_panic_of_the_library_is_one_line(tmp_path):
    """A pattern that only some long text is too much for."""
    tokenizer = load_tokenizer(write(tmp_path / "a", r"(xy|x|y)*$") / "tokenizer.json")
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch([text])):
        with pytest.raises(UserError, match=r"^tokenizer: its library cannot encode a text \(.*retry-limit"):
            encode("xy" * 40 + "!")
