"""The command line, with a tiny model: what it prints, what it refuses, and that --help does not wait for jax."""

import dataclasses
import io
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.cli import main
from gptjax.cli.chat_models import LocalModel
from gptjax.data import Bytes, ChatJsonl
from gptjax.inference import Sampling
from gptjax.interop.templates import ChatTemplate
from gptjax.models.language_model import LanguageModel
from gptjax.models.loading import load
from gptjax.nn import Transformer, TransformerConfig

GREEDY = ["--temperature", "0", "--max-tokens", "8"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> LanguageModel:
    config = TransformerConfig(vocab=264, layers=2, width=16, heads=2)
    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    numpy = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(numpy.normal(0, 0.3, x.shape), jnp.float32), shapes)
    return LanguageModel(config, params, Bytes().build(iter(())), context=64)


@pytest.fixture(scope="module")
def path(model, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("cli") / "model"
    model.save(folder)
    return str(folder)


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command line with this standard input -> (exit code, standard output, standard error)."""

    def run(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            code = main.main(arguments)
        except SystemExit as stop:
            code = stop.code
        return (code, *capsys.readouterr())

    return run


def test_generate_streams_what_the_model_writes(run, path, model):
    (want,) = model.generate("hello", 8, temperature=0)
    assert run("generate", path, "--prompt", "hello", *GREEDY) == (0, want.text + "\n", "")
    assert run("generate", path, *GREEDY, stdin="hello\n") == (0, want.text + "\n", "")
    texts = [c.text for c in model.generate("hello", 8, samples=2, temperature=0)]
    assert run("generate", path, "--prompt", "hello", "--samples", "2", *GREEDY)[1] == "".join(
        f"--- {i + 1} ---\n{text}\n" for i, text in enumerate(texts)
    )


def test_text_is_drawn_as_the_model_says_unless_told_otherwise(run, path, model, tmp_path):
    def written(path, *arguments):
        return run("generate", str(path), "--prompt", "hello", "--max-tokens", "8", *arguments)[1].removesuffix("\n")

    greedy, usual = (dataclasses.replace(model, sampling=Sampling(t, top_p=p)) for t, p in ((0, None), (0.8, 0.95)))
    assert written(path) == usual.generate("hello", 8)[0].text
    greedy.save(tmp_path / "greedy")
    assert written(tmp_path / "greedy") == greedy.generate("hello", 8)[0].text
    assert written(tmp_path / "greedy", "--temperature", "2") == greedy.generate("hello", 8, temperature=2)[0].text


def test_chat_keeps_a_history_and_obeys_its_commands(run, path, model, tmp_path):
    saved = tmp_path / "talk.jsonl"
    lines = ["hello", "", "again", f"/save {saved}", "/reset", "hello", "/system be", "hello", f"/save {saved}", "/huh"]
    code, out, err = run("chat", path, *GREEDY, stdin="\n".join([*lines, "/quit", "never read"]))
    conversation = []
    for said in ("hello", "again"):
        conversation.append({"role": "user", "content": said})
        answer = model.chat(conversation, 8, temperature=0)
        conversation.append({"role": "assistant", "content": answer.content})
    system = [{"role": "system", "content": "be"}, {"role": "user", "content": "hello"}]
    answers = [conversation[1], conversation[3], conversation[1]]
    want = [message["content"] for message in answers] + [model.chat(system, 8, temperature=0).content]
    assert (code, out) == (0, "".join(f"{text}\n" for text in want))
    assert json.loads(saved.read_text().partition("\n")[0])["messages"] == conversation
    assert len(list(ChatJsonl(str(saved), validation=0.0).documents("train"))) == 2
    assert "unknown command '/huh'" in err


def test_chat_passes_variables_to_the_template(run, path, model, tmp_path):
    source = "{% if enable_thinking %}think {{ name }} {% endif %}{{ messages[-1].content }}"
    dataclasses.replace(model, template=ChatTemplate(source)).save(tmp_path / "thinks")
    said = [{"role": "user", "content": "hello"}]
    thinking = dataclasses.replace(model, template=ChatTemplate("think ü {{ messages[-1].content }}"))
    want = thinking.chat(said, 8, temperature=0).content
    given = {"enable_thinking": True, "name": "ü"}
    assert load(tmp_path / "thinks").chat(said, 8, temperature=0, template=given).content == want
    arguments = ("--template", "enable_thinking=true", "name=ü")
    assert run("chat", str(tmp_path / "thinks"), *GREEDY, *arguments, stdin="hello\n") == (0, want + "\n", "")
    assert (
        "(template: got a, must not be given: the model has no" in run("chat", path, "--template", "a=1", stdin="x")[2]
    )
    assert "error: --template: got 'a', must be NAME=VALUE" in run("chat", path, "--template", "a", stdin="x\n")[2]


def test_a_long_chat_is_trimmed_with_a_notice(run, path):
    code, out, err = run("chat", path, *GREEDY, stdin="\n".join(["x" * 20] * 3 + ["y" * 80, "still here"]))
    assert (code, out.count("\n")) == (0, 4)
    assert "(the oldest 2 messages no longer fit the model's context and are left out)" in err
    assert "(messages: got " in err, "a message too long by itself is refused, and the chat goes on"
    assert "left out" not in run("chat", path, *GREEDY, stdin="short\nshort")[2]
    assert "(the oldest 2 messages" in run("chat", path, *GREEDY, "--context", "24", stdin="short\nshort")[2]


def test_ctrl_c_ends_an_answer_not_the_chat(run, path, monkeypatch):
    def interrupted():
        yield "as I was say"
        raise KeyboardInterrupt

    monkeypatch.setattr(LocalModel, "reply", lambda *_: (0, interrupted()))
    assert run("chat", path, stdin="hello\nhello\n") == (0, "as I was say\n" * 2, "")


def test_an_answer_that_was_stopped_before_it_began_leaves_no_turn(run, path, monkeypatch):
    asked = []

    def interrupted(messages):
        asked.append([message.content for message in messages])
        if len(asked) == 1:
            raise KeyboardInterrupt
        yield "well"

    monkeypatch.setattr(LocalModel, "reply", lambda _, messages, options: (0, interrupted(messages)))
    code, out, err = run("chat", path, stdin="hello\nhi\nthere\n")
    assert (code, out, err) == (0, "\nwell\nwell\n", "(no answer; the message is not part of the conversation)\n")
    assert asked == [["hello"], ["hi"], ["hi", "well", "there"]]


def test_eval_measures_a_text(run, path, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("some text to measure " * 5)
    code, out, _ = run("eval", path, "--on", str(text))
    assert code == 0
    assert "bits per byte" in out
    code, _, err = run("eval", path)
    assert (code, err.startswith("error: on: got none, and")) == (2, True)


def test_tokenizers_are_trained_and_reported_on(run, tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "tokenizer"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 50)
    code, printed, _ = run("tokenizer", "train", str(text), "--vocab", "300", "--out", str(out))
    assert (code, printed) == (0, f"300 ids in {out}\n")
    code, printed, _ = run("tokenizer", "report", str(out), str(text))
    assert code == 0
    assert "bytes per token" in printed
    code, _, err = run("tokenizer", "train", str(text), "--out", str(out))
    assert (code, err) == (2, f"error: --out: got {out}, which exists already; choose another folder\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "PATH", "--prompt", "x", "--temperature", "-1"], "error: --temperature: got -1.0, must be 0"),
        (["generate", "PATH", "--prompt", "x", "--max-tokens", "0"], "error: --max-tokens: got 0, must be at least 1"),
        (["chat", "/nowhere"], "error: path: got /nowhere, must be a folder or a hub repository"),
        (["generate", "PATH", "--promt", "x"], "error: no option --promt; nearest: --prompt\n"),
        (["generate"], "error: Missing from gptjax generate: PATH"),
        (["generate", "PATH", "--seed", "1" + "0" * 5_000], "error: --seed: got '1000"),
        (["generate", "PATH", "--seed", str(2**63)], "error: --seed: got '9223372036854775808', must be an integer of"),
        (["generate", "PATH", "--temperature", "nan"], "error: --temperature: got 'nan', must be a finite number\n"),
        (["generate", "PATH", "--top-p=-inf"], "error: --top-p: got '-inf', must be a finite number\n"),
        (["tokenizer", "train", "x", "--out", "y", "--vocab", "1e9"], "error: --vocab: got '1e9', must be an integer"),
        (["chat", "PATH", "--context", "0"], "error: --context: got 0, must be at least 1"),
        (["chat", "PATH", "--key", "x"], "error: --key: got one without --url"),
        (["chat", "--url", "http://x", "--context", "9"], "error: --context: got one with --url"),
        (["chatt"], "chat"),
    ],
)
def test_mistakes_are_named_and_exit_with_2(run, path, arguments, message):
    code, out, err = run(*(path if argument == "PATH" else argument for argument in arguments))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_a_reader_that_leaves_early_gets_no_message(path):
    """`| head -0`, while the output is written and, as it is less than a buffer, when the program ends."""
    for arguments in (["generate", path, "--prompt", "x", *GREEDY], ["chat", "--help"], ["--help"]):
        read, write = os.pipe()
        os.close(read)
        command = [sys.executable, "-m", "gptjax.cli.main", *arguments]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=write, stderr=subprocess.PIPE, timeout=120)
        os.close(write)
        assert (done.returncode, done.stderr) == (1, b"")


def test_help_does_not_wait_for_jax():
    program = (
        "import sys; from gptjax.cli.main import main\ntry: main(['--help'])\nfinally: assert 'jax' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "chat" in done.stdout
