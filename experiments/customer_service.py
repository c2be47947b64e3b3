"""Customer service and small talk in English and Chinese: `python -m experiments customer_service`.

    python -m experiments customer_service
    gptjax chat runs/customer_service

One small model and one tokenizer for both languages. It learns small talk from chatterbot-corpus (BSD-3, downloaded;
1,081 conversations to learn from, 185 held out by their first question) and cases of a help desk, which are generated:
the customer says name and order number, then a problem, and the last reply must name them again.

600 steps, 4 CPU minutes, measured once on held-out conversations:

                                              English                 Chinese
    perplexity of a reply's token             228 [180, 289]          646 [398, 1,050]
    after other conversations (the floor)     406                     736
    nats a token gained by reading            0.58 [0.44, 0.72]       0.13 [0.02, 0.24]
    likelier after its own than three others  52 % [45, 59] of 167    37 % [23, 51] of 59   (chance: 25 %)

    cases whose last reply is right           200 of 200
    the same without the turns before         0 of 200

The model reads its conversations, but a thousand of them do not teach it to answer new questions. It learns them by
heart; the validation loss is lowest at step 400. Reading the files needs PyYAML.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Iterator
from typing import Literal

import numpy as np

from gptjax import Expect, Experiment, Stage, data, evals, objectives, optim
from gptjax.data import Message
from gptjax.data.chat import Conversation
from gptjax.data.files import file_state, find_files
from gptjax.data.sources import check_fraction, fingerprint, of_split
from gptjax.nn import TransformerConfig
from gptjax.protocols import Split
from gptjax.tasks import Generation, HeldOut, Reply, Score, Task, TaskConversations
from gptjax.tasks.task import unanswered
from gptjax.types import UserError

URL = "https://raw.githubusercontent.com/gunthercox/chatterbot-corpus/master/chatterbot_corpus/data"
COMMON = (
    "ai botprofile conversations emotion food gossip greetings history humor literature money movies politics "
    "psychology science sports trivia"
)
FILES = {"english": f"{COMMON} computers health tech_support", "chinese": COMMON}
"""Language -> its files of small talk. (`coding` has programs.)"""

Language = Literal["english", "chinese"]


@dataclasses.dataclass(frozen=True)
class Chatterbot:
    """Conversations of chatterbot-corpus (BSD-3), each once. All replies to one question are in one split."""

    root: str = URL
    """Folder, or its URL, with a folder of YAML files for each language."""
    languages: tuple[Language, ...] = ("english", "chinese")
    """Languages to read."""
    validation: float = 0.15
    """Fraction held out for validation, chosen by a hash of the first question."""

    def __post_init__(self) -> None:
        check_fraction(self.validation)

    def paths(self) -> list[str]:
        return [f"{self.root}/{language}/{name}.yml" for language in self.languages for name in FILES[language].split()]

    def documents(self, split: Split) -> Iterator[Conversation]:
        return of_split(self.keyed(), split, self.root, self.validation)

    def keyed(self) -> Iterator[tuple[str, Conversation]]:
        """All conversations, each with its first question in lower case."""
        found = dict.fromkeys(texts for path in self.paths() for texts in _texts(path, json.dumps(file_state(path))))
        for texts in found:
            roles = ("user", "assistant") * (len(texts) // 2)  # a last question without a reply is left out
            yield texts[0].lower(), tuple(Message(role, text) for role, text in zip(roles, texts, strict=False))

    def fingerprint(self) -> str:
        return fingerprint(self, *(file_state(path) for path in self.paths()))


@functools.lru_cache(maxsize=64)
def _texts(path: str, state: str) -> list[tuple[str, ...]]:
    """Texts of each conversation in a file."""
    try:
        import yaml
    except ImportError:
        raise UserError("root: its YAML files need PyYAML; pip install pyyaml") from None
    (file,) = find_files(path)
    try:
        rows = yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]
        return [tuple(str(text).strip() for text in row) for row in rows if len(row) > 1]
    except (yaml.YAMLError, LookupError, TypeError) as error:
        raise UserError(
            f"root: {file}: got no conversations ({type(error).__name__}), must be YAML with them"
        ) from None


NAMES = {
    "english": "Alice Ben Carla David Emma Frank Grace Henry Irene Jack Kate Leo Mary Nina Oscar Paul",
    "chinese": "王芳 李伟 张敏 刘洋 陈静 杨磊 赵强 黄丽 周杰 吴娜 徐明 孙燕",
}
PROBLEMS = {
    "english": (
        ("My system is overheating.", "Ensure air vents aren't blocked and clean any dust."),
        ("My computer won't turn on.", "Check if it's plugged in and hold the power button for 10 seconds."),
        ("My mouse is not responding.", "Try plugging it into another USB port or changing the batteries."),
        ("My laptop screen is black.", "Try adjusting brightness or connecting an external monitor."),
        ("I can't hear any sound.", "Check the volume and ensure your output device is selected."),
        ("My internet is not working.", "Restart your router and check if the cables are connected properly."),
        ("I forgot my password.", "Use the password reset option or contact your admin."),
        ("My printer is not printing.", "Ensure it's powered on and has paper, then restart it."),
    ),
    "chinese": (
        ("我的电脑过热。", "请确认散热孔没有被堵住，并清理灰尘。"),
        ("我的电脑无法开机。", "请检查电源是否插好，并按住电源键十秒。"),
        ("我的鼠标没有反应。", "请换一个接口，或者更换电池。"),
        ("我的屏幕是黑的。", "请调节亮度，或者连接另一台显示器。"),
        ("我听不到声音。", "请检查音量，并选择正确的输出设备。"),
        ("我的网络不能用。", "请重启路由器，并检查网线是否接好。"),
        ("我忘记了密码。", "请使用重置密码的功能，或者联系管理员。"),
        ("我的打印机不打印。", "请确认打印机已开机并且有纸，然后重启。"),
    ),
}
SAID = {
    "english": (
        ("Hello, this is {name}. My order is {order}.", "Hello {name}, how can I help you?"),
        ("Thank you, that works.", "I am closing the case of order {order}. Goodbye, {name}!"),
        ("That does not help.", "I am sending a technician for order {order}, {name}. I noted: {problem}"),
    ),
    "chinese": (
        ("你好，我是{name}。我的订单号是{order}。", "你好，{name}，请问有什么可以帮您？"),
        ("谢谢，问题解决了。", "订单{order}的问题已经解决。再见，{name}！"),
        ("还是不行。", "我会派技术员处理订单{order}，{name}。我记录的问题是：{problem}"),
    ),
}


@dataclasses.dataclass(frozen=True)
class Service(Task):
    """Cases of a help desk, generated: greeting, problem, end. The last reply names order, customer and problem, which
    the customer said two turns before. The English problems are those of chatterbot-corpus.

    The outcome is 1 if the last reply has all of them right; `parts` has each. Item i is a pure function of `seed` and
    i; items with one order number form a cluster."""

    count: int = 4_000
    """Number of items, English and Chinese in turn."""
    seed: int = 0
    """Random seed."""
    forget: bool = False
    """True: prompts have the customer's last message alone. A control: what is right then is guessed."""

    def __len__(self) -> int:
        return self.count

    @property
    def name(self) -> str:
        return "Service without history" if self.forget else "Service"

    def facts(self, i: int) -> dict[str, str]:
        """Language, order, name, problem and its solution, and the way in which the case ends."""
        random = np.random.default_rng([self.seed, i])
        language = ("english", "chinese")[i % 2]
        problem, solution = PROBLEMS[language][random.integers(len(PROBLEMS[language]))]
        name, order = str(random.choice(NAMES[language].split())), str(random.integers(1_000, 10_000))
        end = ("solved", "not solved")[random.integers(2)]
        return {
            "language": language,
            "order": order,
            "name": name,
            "problem": problem,
            "solution": solution,
            "end": end,
        }

    def example(self, i: int) -> Conversation:
        facts = self.facts(i)
        greeting, solved, unsolved = SAID[facts["language"]]
        turns = (greeting, ("{problem}", "{solution}"), solved if facts["end"] == "solved" else unsolved)
        return tuple(
            Message(role, text.format(**facts))
            for turn in turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
        )

    def prompt(self, i: int) -> Conversation:
        return self.example(i)[-2:-1] if self.forget else self.example(i)[:-1]

    def score(self, i: int, reply: Reply) -> Score:
        facts, said = self.facts(i), reply.text
        noted = re.search(r"(?:noted: |问题是：)(.*)", said)
        names = [name for name in NAMES[facts["language"]].split() if name in said]
        parts = {
            "order": float(re.findall(r"\d+", said) == [facts["order"]]),
            "name": float(names == [facts["name"]]),
            "problem": float((noted[1].strip() if noted else "") == facts["problem"] * (facts["end"] != "solved")),
        }
        if not said.strip():
            return unanswered(reply, parts)
        return Score(float(all(parts.values())), parts=parts, extracted=facts["order"] if parts["order"] else None)

    def cluster(self, i: int) -> str:
        return self.facts(i)["order"]

    @property
    def generation(self) -> Generation:
        return Generation(max_tokens=64)


def talk(*languages: Language) -> evals.ReplyLikelihood:
    return evals.ReplyLikelihood(Chatterbot(languages=languages), title=f"Replies in {languages[0].capitalize()}")


experiment = Experiment(
    model=TransformerConfig(vocab=2_048, layers=3, width=128, heads=4),
    tokenizer=data.TrainSentencePiece(vocab=2_048),
    stages={
        "talk": Stage(
            data=data.Chat(
                data.Mix((Chatterbot(), TaskConversations(Service())), (1.0, 2.0)),
                length=192,
                batch=16,
            ),
            objective=objectives.NextToken(),
            optimizer=optim.AdamW(learning_rate=3e-3, schedule=optim.Linear(warmup=50), weight_decay=0.1, clip=1.0),
            steps=600,
            evaluate_every=100,
            eval_sequences=64,
            save_every=300,
            prompts=("Hello", "你好", "My printer is not printing."),
            evaluations=(
                talk("english"),
                talk("chinese"),
                evals.Generative(HeldOut(Service()), items=200),
                evals.Generative(HeldOut(Service(forget=True)), items=200),
            ),
        )
    },
    expect=(
        Expect("Replies in English/own_first", above=0.4),
        Expect("Replies in Chinese/nats_gained", above=0.0),
        Expect("Service/accuracy", above=0.9),
        Expect("Service without history/accuracy", below=0.05),
    ),
)
