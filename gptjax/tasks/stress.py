"""Replies that must not score: a reward for one of them is what training would find.

assert not stress(task)                      # [(item, kind, score), ...] of the replies that scored
"""

from __future__ import annotations

from collections.abc import Iterator

from gptjax.tasks.task import ChoiceTask, Reply, Task


def stress(task: Task, items: int = 8) -> list[tuple[int, str, float]]:
    """(item, kind, outcome or reward) of the bad replies to the first items that score: above 0, or in a graded task as
    much as the right reply. Kinds: empty, echo, tags, numbers, options, among many."""
    found = []
    for i in range(min(items, len(task))):
        right = task.score(i, Reply(task.example(i)[-1].text))
        for kind, text in bad_replies(task, i):
            score = task.score(i, Reply(text))
            got, most = max(score.outcome, score.value), min(right.outcome, right.value)
            if got > 0 and (not task.graded or got >= most or kind == "empty"):
                found.append((i, kind, got))
    return found


def bad_replies(task: Task, i: int) -> Iterator[tuple[str, str]]:
    """(kind, text) of replies to item `i` that are not right."""
    *asked, answer = task.example(i)
    right = answer.text.strip()
    others = [task.example(j)[-1].text.strip() for j in range(min(len(task), 6)) if j != i]
    if "```" in right:  # other versions of the same program
        others = [right.replace("return", "return None  #"), right.replace("return", "return 0 *")]
    others = [other for other in others if task.score(i, Reply(other)).outcome < 1]
    last = right.rpartition("####")[2].strip() if "####" in right else right
    yield "empty", ""
    yield "empty", " \n\n "
    yield "echo", asked[-1].text
    yield "echo", f"{asked[-1].text}\n{asked[-1].text}"
    yield "tags", "<answer></answer>" * 20
    yield "tags", "#### #### #### The answer is The answer is"
    yield "numbers", "The answer is " + ", ".join(map(str, range(101)))
    yield "numbers", "\n".join(f"#### {n}" for n in range(-50, 101))
    if isinstance(task, ChoiceTask):
        labels = [option.strip() for _, option in task.choices(i).options]
        letters = "ABCDEFGHIJ"[: len(labels)]
        yield "options", " ".join(letters)
        yield "options", " or ".join(labels)
        yield "options", "\n".join(f"The answer is {letter}." for letter in letters)
        yield "options", "\n".join(f"{letter}. {label}" for letter, label in zip(letters, labels, strict=False))
    if others:
        yield "among many", "\n".join([others[0], right, *others[1:]])
        yield (
            "among many",
            f"#### {others[0].rpartition('####')[2].strip()} {last} {others[-1].rpartition('####')[2].strip()}",
        )
        yield "among many", "\n\n".join([right, others[0]])
