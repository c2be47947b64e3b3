"""A model as a judge: the prompt that asks which of two replies is better, and the reading of its verdict.

Each pair is judged in both orders; a judge that changes its mind with the order says tie (Zheng et al. 2023,
arXiv:2306.05685). Its bias towards the first reply is then a figure of the report.
"""

from __future__ import annotations

import re

from gptjax.data.chat import Conversation, Message
from gptjax.evals.ratings import Choice

INSTRUCTIONS = """\
Compare the replies of two assistants to the conversation below. Judge how correct, helpful, relevant and clear they
are. Neither their order nor their length matters. Explain your judgement in a few sentences, then end with one line:
[[A]] if reply A is better, [[B]] if reply B is better, [[C]] if they are equally good, [[D]] if both are bad."""
VERDICTS: dict[str, Choice] = {"A": "left", "B": "right", "C": "tie", "D": "both bad"}
_VERDICT = re.compile(r"\[\[([ABCD])\]\]")


def question(prompt: Conversation, first: str, second: str) -> str:
    """The text to send to the judge."""
    said = "\n\n".join(f"{message.role}: {message.text}" for message in prompt)
    parts = {"Conversation": said, "Reply A": first, "Reply B": second}
    return "\n\n".join([INSTRUCTIONS, *(f"=== {name} ===\n{text}" for name, text in parts.items()), "=== End ==="])


def verdict(text: str) -> Choice | None:
    """The last verdict in the judge's reply, or None: it gave none."""
    found = _VERDICT.findall(text)
    return VERDICTS[found[-1]] if found else None


def as_messages(prompt: Conversation, first: str, second: str) -> list[Message]:
    """The conversation with the judge."""
    return [Message("user", question(prompt, first, second))]
