"""Texts of an untrained model keep what a constraint asks, whatever else they are asked."""

import functools
import json
import random
import re
import time

import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest

from gptjax.data.tokenizers import TrainCharacters, TrainSentencePiece
from gptjax.data.tokenizers.bytes import Bytes
from gptjax.inference.constraints import Choice, Compiler, Ebnf, JsonSchema, Regex
from gptjax.inference.engine import Engine, Request
from gptjax.inference.sampling import Sampling
from gptjax.nn import TransformerConfig
from gptjax.types import UserError

TOKENIZER = Bytes().build(iter(()))
CONFIG = TransformerConfig(vocab=272, layers=1, width=16, heads=2)
GRAMMARS = {
    "regex": (Regex(r"(ab|abc/\d{1,3})d?"), re.compile(r"(ab|abc/\d{1,3})d?")),
    "choice": (Choice(("yes", 'no /\n "so"', "naïve", "yes and no")), re.compile('yes( and no)?|no /\n "so"|naïve')),
    "lark": (Ebnf('start: "a" b "." | "z"\nb: "(" b ")" | "c"'), re.compile(r"a\(*c\)*\.|z")),
    "gbnf": (Ebnf('root ::= "yes" | "no" [0-9] [0-9]?'), re.compile("yes|no[0-9]{1,2}")),
}


@pytest.fixture(scope="module")
def engine() -> Engine:
    shapes = jax.eval_shape(CONFIG.build().init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(draw.normal(0, 0.3, x.shape), jnp.float32), shapes)
    engine = Engine(CONFIG.build(), params, TOKENIZER, rows=8, context=1_024, page=16)
    engine.warm_up()
    return engine


def schema(draw: random.Random, depth: int = 3) -> dict:
    """A schema all of whose texts are short."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "pattern"]
    kind = draw.choice(kinds + ["object", "object", "array", "anyOf", "ref"] * (depth > 0))
    inner = functools.partial(schema, draw, depth - 1)
    match kind:
        case "string":
            return {"type": "string", "minLength": draw.randint(0, 2), "maxLength": draw.randint(2, 5)}
        case "pattern":
            return {"type": "string", "pattern": draw.choice(["^[a-z]{2,4}$", "^\\d{3}-\\d{2}$", "^(ä|ö)x?$"])}
        case "integer":
            low = draw.randint(-50, 50)
            return {"type": "integer", "minimum": low, "maximum": low + draw.randint(0, 200)}
        case "number":
            return {"type": "number", "minimum": 0, "exclusiveMaximum": draw.choice([1, 17.5])}
        case "enum":
            return {"enum": draw.sample(["a", "x y", 'q"\\', 3, -1.5, None, True, ["l", 1]], 3)}
        case "object":
            properties = {name: inner() for name in draw.sample(["a", "b", "name of it", "ü", '"'], draw.randint(1, 3))}
            required = draw.sample(sorted(properties), draw.randint(0, len(properties)))
            return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
        case "array":
            return {"type": "array", "items": inner(), "minItems": draw.randint(0, 1), "maxItems": 2}
        case "anyOf":
            return {"anyOf": [inner(), inner()]}
        case "ref":
            return {"$ref": "#/$defs/shared"}
    return {"type": kind}


def test_json_is_always_that_of_the_schema(engine):
    """Streamed pieces too; with penalties, log-probabilities, biases and minimum lengths."""
    draw, asked, schemas = random.Random(0), [], []
    for i in range(40):
        shared = {"type": "string", "maxLength": 3}
        schemas.append({"$defs": {"shared": shared}, **schema(draw)})
        settings = (Sampling(temperature=0), Sampling(1.3, frequency_penalty=1.0), Sampling(2.0, top_k=3, min_p=0.1))
        options = {"alternatives": i % 3, "min_tokens": i % 9, "bias": {ord("}"): -20.0} if i % 4 == 0 else {}}
        constraint = engine.constraint(JsonSchema(schemas[-1]))
        asked.append(Request((i, 7), 900, settings[i % 3], seed=i, constraint=constraint, **options))
    texts = [engine.submit(request) for request in asked]
    shown = [""] * len(texts)
    while engine.run_round():
        for i, text in enumerate(texts):
            piece = text.snapshot()[0]
            assert piece.startswith(shown[i])
            shown[i] = piece
    for text, one in zip(texts, schemas, strict=True):
        assert text.finish == "stop", (text.text, one, text.error)
        jsonschema.validate(json.loads(text.text), one, jsonschema.Draft202012Validator)
        assert re.search(r"\s{9}", re.sub(r'"(\\.|[^"\\])*"', "x", text.text)) is None, "white space is bounded"
        assert TOKENIZER.decode(token.id for token in text.tokens) == text.text
    assert len({text.text for text in texts}) > 20


@pytest.mark.parametrize("name", GRAMMARS)
def test_texts_are_of_the_language(engine, name):
    grammar, pattern = GRAMMARS[name]
    constraint = engine.constraint(grammar)
    texts = [engine.submit(Request((i,), 400, Sampling(1.5), seed=i, constraint=constraint)) for i in range(12)]
    cut = engine.submit(Request((1,), 1, constraint=constraint))
    engine.run()
    for text in texts:
        assert text.finish == "stop"
        assert pattern.fullmatch(text.text), text.text
    assert (cut.finish, len(cut.tokens)) == ("length", 1) or pattern.fullmatch(cut.text)
    assert len({text.text for text in texts}) > 1


def test_a_text_ends_where_its_constraint_lets_it(engine):
    some = engine.constraint(Regex("a+"))
    end = TOKENIZER.eos
    asked = {
        "soon": Request((1,), 40, bias={end: 50.0}, constraint=some),
        "late": Request((1,), 40, bias={end: 50.0}, constraint=some, min_tokens=9),
        "never": Request((1,), 40, bias={end: 50.0}, constraint=some, stop_token_ids=()),
        "a letter": Request((1,), 40, constraint=some, stop_token_ids=(ord("a"),)),
        "free": Request((1,), 40, bias={end: 50.0}, min_tokens=9),
    }
    texts = {name: engine.submit(request) for name, request in asked.items()}
    engine.run()
    assert (texts["soon"].text, texts["soon"].finish) == ("a", "stop")
    assert (texts["late"].text, texts["late"].finish) == ("a" * 9, "stop")
    assert (texts["never"].text, texts["never"].finish) == ("a" * 40, "length")
    assert (texts["a letter"].text, texts["a letter"].finish) == ("", "error"), "where may it begin?"
    assert (len(texts["free"].tokens), texts["free"].finish) == (10, "stop")


def test_a_constraint_that_breaks_ends_its_text_alone(engine):
    class Broken:
        accepting = finished = False

        def start(self):
            return self

        def fill(self, mask):
            mask[:] = 0xFFFFFFFF

        def accept(self, token):
            raise ValueError("cannot count so far")

    alone = engine.submit(Request((1,), 20, seed=1))
    engine.run()
    broken, other = engine.submit(Request((1,), 20, constraint=Broken())), engine.submit(Request((1,), 20, seed=1))
    engine.run()
    assert (broken.finish, broken.error) == ("error", "constraint: cannot count so far")
    assert other.tokens == alone.tokens
    assert engine.pages.free == engine.pages.count


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (JsonSchema({"type": "nonsense"}), "^grammar: got an invalid one: Invalid type: nonsense"),
        (JsonSchema({"$ref": "http://127.0.0.1/x"}), "does not fetch"),
        (JsonSchema({"type": "object", "unevaluatedProperties": False, "x-guidance": {"lenient": True}}), "Unimpl"),
        (JsonSchema({"type": "string", "minLength": 5, "maxLength": 3}), "Unsatisfiable"),
        (JsonSchema({"title": "x" * 70_000}), r"^grammar: got 70,\d+ characters, must be at most"),
        (JsonSchema(functools.reduce(lambda s, _: {"items": s}, range(100), {})), "^schema: got one of more than 64"),
        (Regex("(("), "unclosed group"),
        (Ebnf("start: " + "(" * 30_000), "nested"),
        (Ebnf("(((("), "^grammar: got an invalid one"),
        (Choice(()), "^choice: got no text"),
        (Choice(("a",) * 1_001), "^choice: got 1001 texts"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_bad_grammars_are_refused_soon(engine, grammar, message):
    started = time.monotonic()
    with pytest.raises(UserError, match=message):
        engine.constraint(grammar)
    assert time.monotonic() - started < 5


def test_tokens_of_several_bytes_and_tokenizers_that_cannot_be_described():
    """Random texts of the allowed tokens, where the tokenizer puts a space before all text."""
    said = ['{"name": "Ada", "age": 36} and yes, no, maybe'] * 50
    tokenizer = TrainSentencePiece(vocab=300).build(iter(said))
    compiler = Compiler(tokenizer, tokenizer.vocab)
    one = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 9}}, "required": ["name"]}
    one["additionalProperties"] = False
    constraint, draw = compiler.compile(JsonSchema(one)), random.Random(0)
    assert compiler.compile(JsonSchema(dict(one))) is constraint, "compiled once"
    for _ in range(20):
        matcher, ids = constraint.start(), []
        while not matcher.finished:
            mask = np.zeros(-(-tokenizer.vocab // 32), np.uint32)
            matcher.fill(mask)
            allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
            assert max(allowed) < tokenizer.vocab
            ids.append(int(draw.choice(allowed)))
            matcher.accept(ids[-1])
        jsonschema.validate(json.loads(tokenizer.decode_bytes(ids)), one)
    letters = TrainCharacters().build(iter(said))
    with pytest.raises(UserError, match=r"^constraint: got a tokenizer of the kind characters without tokens for"):
        Compiler(letters, letters.vocab)
