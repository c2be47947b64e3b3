"""Masks of what the assistant wrote, compared with `transformers` over the templates of the trl wheel: plain ones, as
models have them, and trl's copies of them with generation blocks."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import re
from pathlib import Path

import pytest

from gptjax import data
from gptjax.data.chat import Conversation, conversation
from gptjax.interop import tokenizers
from gptjax.interop.templates import ChatTemplate
from gptjax.types import UserError

pytestmark = pytest.mark.torch
transformers = pytest.importorskip("transformers")
WHEEL = importlib.util.find_spec("trl")  # its files are read, it is not imported
if WHEEL is None or WHEEL.origin is None:
    pytest.skip("needs the files of trl: pip install 'gptjax[torch]'", allow_module_level=True)
FOLDER = Path(WHEEL.origin).parent / "chat_templates"
PAIRS = sorted(path.stem.removesuffix("_training") for path in FOLDER.glob("*_training.jinja"))
TOKENS = {"bos_token": "<bos>", "eos_token": "<eos>"}
MORE = ("</s>", "<end_of_turn>", "<start_of_turn>", "<end_of_utterance>", "<turn|>", "<|turn>")
MORE += ("<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", "<|channel>", "<channel|>")

PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer", "description": "n"}}, "required": ["a"]}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Add.", "parameters": PARAMETERS}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def said(*texts: str, **fields: object) -> list[dict]:
    turns = zip(itertools.cycle(("user", "assistant")), texts)
    return [{"role": role, "content": text} | (fields if role == "assistant" else {}) for role, text in turns]


CALLING = [*said("1+2?", "", tool_calls=[CALL])[:2], {"role": "tool", "content": "3", "name": "add"}]
CALLING[1]["tool_calls"] = [CALL]
TALKS = {
    "turns": (said("2+2?", "It is 4, ✓.", "Thanks é", " Bye\n", "x", "y"), None),
    "system": ([{"role": "system", "content": "Be brief."}, *said("2+2?", "4.", "Thanks", "Bye")], None),
    "reasoning": (said("2+2?", "4.", reasoning_content="Two and two."), None),
    "more reasoning": (said("2+2?", "4.", "And 3?", "7.", reasoning_content="Two and two."), None),
    "calls": ([*CALLING, {"role": "assistant", "content": "It is 3."}], TOOLS),
    "more calls": ([*CALLING, {"role": "assistant", "content": "It is 3."}, *said("Thanks", "Bye")], TOOLS),
}
REFUSED = {
    "tools: got some, which": "we refuse tools that a template leaves out; transformers drops them without a word",
    "tool_calls: got some, which": "as tools",
    "reasoning_content: got some, which": "as tools",
    "messages: refused": "the template's own refusal",
}
REWRITTEN = ("qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6")
"""Templates that drop the reasoning of earlier answers, where trl's copies keep it (or write an empty one): we train
what the model will read, which the plain template says."""
WRITES_ARGUMENTS_AS_TEXT = ("deepseekv3",)
"""trl's copy reads arguments that are objects; we give the plain one a text, as it wants."""
MORE_TRAINED = ("diffusion_gemma",)
"""After a call it writes <|tool_response>, at which the model stops: we train it. Its prompt after a result lacks
<|turn>model, which its conversation has: we train that too. trl's copy trains neither."""


@pytest.fixture(scope="module")
def tokenizer() -> data.Tokenizer:
    sources = "".join(path.read_text() for path in FOLDER.glob("*.jinja"))
    found = {*re.findall(r"<\|[A-Za-z_0-9]+\|>|<｜[^｜<>]+｜>", sources), *MORE}
    bytes_ = data.Bytes().build(iter(()))
    return dataclasses.replace(bytes_, specials={"<bos>": 256, "<eos>": 257}).with_specials(sorted(found))


@pytest.fixture(scope="module")
def theirs(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizers.save(tokenizer, folder, 4096, ChatTemplate("{{ bos_token }}", TOKENS))
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    loaded.add_special_tokens(TOKENS)
    return loaded


def source(name: str) -> str:
    return (FOLDER / f"{name}.jinja").read_text()


def rendered(theirs, template: ChatTemplate, talk: Conversation, mask: bool, count: int | None = None):
    """Ids, and the mask, of `transformers`."""
    turns = [template._turn(message) for message in talk]
    settings = {"chat_template": template.source, "tools": list(talk[0].tools) or None}
    if count is not None:
        return theirs.apply_chat_template(turns[:count], add_generation_prompt=True, **settings)["input_ids"]
    found = theirs.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=mask, **settings)
    return list(found["input_ids"]), [float(m) for m in found.get("assistant_masks", [])]


def rows_of(template: ChatTemplate, talk: Conversation, tokenizer: data.Tokenizer) -> list[Conversation]:
    """Rows to train. None for a talk that is refused for one of the reasons in `REFUSED`."""
    try:
        return template.rows(talk, tokenizer)
    except UserError as error:
        if not str(error).startswith(tuple(REFUSED)):
            raise
        return []


def runs(weights):
    """(start, end) of each run of ones."""
    at = 0
    for kind, group in itertools.groupby(weights):
        size = len(list(group))
        if kind:
            yield at, at + size
        at += size


@pytest.mark.parametrize("name", PAIRS)
def test_generation_blocks_are_those_of_transformers(tokenizer, theirs, name):
    """Equal ids, and equal masks of the answers that a row trains, from the templates with blocks."""
    template = ChatTemplate(source(f"{name}_training"), TOKENS)
    compared = 0
    for talk, tools in TALKS.values():
        rows = rows_of(template, conversation(talk, tools), tokenizer)
        for row in rows:
            ids, weights = template.render(row, tokenizer)
            expected, mask = rendered(theirs, template, row, mask=True)
            assert ids == expected
            if len(rows) > 1:
                start = weights.index(1.0)  # earlier answers are context
                mask[:start] = [0.0] * start
            assert weights == mask
            compared += 1
    assert compared >= 1


@pytest.mark.sampled
@pytest.mark.parametrize("name", PAIRS)
def test_prefix_differences_are_the_generation_blocks(tokenizer, theirs, name):
    """From the plain template: the same ids as `transformers`, and the mask of its copy with generation blocks, but for
    what the prompt already has and for spaces after the token that ends the answer: the model writes neither."""
    template, tagged = ChatTemplate(source(name), TOKENS), ChatTemplate(source(f"{name}_training"), TOKENS)
    special, compared = set(tokenizer.specials.values()), 0
    for talk, tools in TALKS.values():
        rows = rows_of(template, conversation(talk, tools), tokenizer)
        for row in rows:
            ids, weights = template.render(row, tokenizer)
            expected, _ = rendered(theirs, template, row, mask=False)
            stop = [] if ids == expected else ids[-1:]  # GLM 4.5 ends an answer by the token of the next turn
            assert ids == [*expected, *stop]
            answers = [i for i, m in enumerate(row) if m.role == "assistant" and m.target]
            found = list(runs(weights))
            assert len(found) == len(answers)
            assert all(ids[end - 1] in special for _, end in found), "the token that ends an answer is trained"
            for i, (start, _) in zip(answers, found, strict=True):
                prompt = rendered(theirs, template, row, False, count=i)
                assert ids[:start] == prompt[:start]
                assert tokenizer.decode(prompt[start:]).strip() in ("", "<think>", "<think>\n\n</think>", "</think>")
            others, mask = rendered(theirs, tagged, row, mask=True)
            if others != ids:
                assert name in (*REWRITTEN, *WRITES_ARGUMENTS_AS_TEXT)
                continue
            if name in MORE_TRAINED and talk[0]["content"] == "1+2?":
                continue
            assert all(block for block, weight in zip(mask, weights, strict=True) if weight)
            first = 0 if len(rows) == 1 else found[0][0]
            beyond = [block > weight for block, weight in zip(mask[first:], weights[first:], strict=True)]
            for before, after in runs(beyond):
                prompted = first + after in {start for start, _ in found}
                assert prompted or tokenizer.decode(ids[first + before : first + after]).strip() == ""
            compared += 1
    assert compared >= 1
