"""The wall time of a run, over all its processes, is accounted for: steps that count, and all else by name."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from tiny_experiment import EXPERIMENT, PRETRAIN

from gptjax.distributed import sharding
from gptjax.distributed.sharding import MeshConfig
from gptjax.experiment.experiment import Experiment
from gptjax.monitor import metrics
from gptjax.monitor.times import USEFUL, WallTime, save_interval

STAGE = dataclasses.replace(PRETRAIN, steps=12, save_every=4, log_every=1, evaluations=(), prompts=())
TINY = dataclasses.replace(EXPERIMENT, stages={"pretrain": STAGE}, mesh=MeshConfig())
LONG_AGO = 1e9


def line(seconds: dict[str, float], stage: str | None = None, step: int = 0) -> dict:
    return {"time": 0.0, "seconds": seconds} | ({} if stage is None else {"stage": stage, "step": step})


def test_steps_count_once_and_all_time_is_somewhere():
    """Random histories: a step's seconds count if no line goes back beyond it later, else they are lost."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        lines, done, spent, useful = [], {"a": 0, "b": 0}, 0.0, {"a": np.zeros(200), "b": np.zeros(200)}
        for _ in range(40):
            stage = str(rng.choice(["a", "b"]))
            if rng.random() < 0.2:  # a kill, and a resume from an earlier step
                done[stage] = int(rng.integers(done[stage] + 1))
                useful[stage][done[stage] :] = 0.0
                seconds = {"down": rng.random(), "restore": rng.random()}
            else:
                number, each = int(rng.integers(1, 5)), rng.random()
                useful[stage][done[stage] : done[stage] + number] = each
                done[stage] += number
                seconds = {"input": rng.random(), "device": 0.75 * number * each, "host": 0.25 * number * each}
            spent += sum(seconds.values())
            lines.append(line(seconds, stage, done[stage]))
        wall, expected = WallTime(lines), sum(steps.sum() for steps in useful.values())
        assert wall.total == pytest.approx(spent)
        assert wall.parts["steps"] == pytest.approx(expected)
        assert wall.goodput == pytest.approx(expected / spent)
        assert wall.counts["down"] == sum("down" in one["seconds"] for one in lines)


def test_the_interval_between_checkpoints_loses_the_least():
    """Cost of saving plus half an interval per failure, as a share of the time."""
    for cost, mean in ((0.1, 3600.0), (5.0, 86400.0)):
        intervals = np.linspace(0.2, 5.0, 481) * save_interval(cost, mean)
        assert intervals[np.argmin(cost / intervals + intervals / 2 / mean)] == pytest.approx(
            save_interval(cost, mean), rel=0.02
        )


@pytest.fixture
def batches(monkeypatch):
    """Functions by number of a batch, called before it is placed; batches take a while."""
    hooks, place, seen = {}, sharding.global_array, []

    def placed(batch, rules):
        seen.append(batch)
        hooks.pop(len(seen), lambda: None)()
        time.sleep(0.05)
        return place(batch, rules=rules)

    monkeypatch.setattr(sharding, "global_array", placed)
    return hooks


def interrupted(experiment: Experiment, folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        experiment.run(folder)


def test_a_run_that_is_killed_and_stopped_tells_where_its_time_went(tmp_path, batches):
    """Killed in the eleventh step, after the checkpoint of the eighth; stopped by a signal; then trained to its end."""
    left, killed = tmp_path / "left", tmp_path / "killed"
    # Each of two checkpoints has a validation batch. A copy of the folder is what a kill leaves.
    batches[13] = lambda: (time.sleep(0.5), shutil.copytree(left, killed), signal.raise_signal(signal.SIGTERM))
    start = time.time()
    interrupted(TINY, left)
    shutil.rmtree(left)
    before = metrics.read_wall(killed)
    beyond = sum(x["seconds"].get(part, 0.0) for x in before if x.get("step", 0) > 8 for part in USEFUL)
    assert beyond > 0
    batches[15] = lambda: signal.raise_signal(signal.SIGTERM)
    interrupted(TINY, killed)
    assert TINY.run(killed) == 0
    seconds = time.time() - start

    lines = metrics.read_wall(killed)
    wall = WallTime(lines)
    assert wall.total == pytest.approx(lines[-1]["time"] - start, abs=0.1)
    assert wall.total == pytest.approx(seconds, rel=0.5)
    assert wall.counts["down"] == 2
    assert wall.counts["checkpoint"] == len({x["step"] for x in lines if "checkpoint" in x["seconds"]})
    assert wall.parts["lost"] >= beyond
    assert wall.parts["down"] > 0
    assert wall.parts["input"] > 0.05 * 8
    assert min(wall.parts[part] for part in ("start", "restore", "evaluation", "checkpoint")) > 0
    recorded = [x["goodput"] for x in metrics.read(killed) if "loss" in x]
    assert len(recorded) == 12
    assert recorded[-1] == pytest.approx(wall.goodput, rel=0.5)

    report = (killed / "report" / "report.md").read_text()
    share = dict(re.findall(r"^\| (.*?) \| .* \| (.*)% \|$", report, re.MULTILINE))
    assert float(share.pop("wall time")) == 100
    assert sum(map(float, share.values())) == pytest.approx(100, abs=2)
    assert "as many as here, one every" in report
    assert re.search(r"checkpoints, each of which blocked training for [\d.e-]+ s\.", report)


def test_the_time_until_a_run_is_extended_is_not_counted(tmp_path, batches):
    folder = tmp_path / "run"
    short = dataclasses.replace(TINY, stages={"pretrain": dataclasses.replace(STAGE, steps=4)})
    assert short.run(folder) == 0
    path = folder / "wall.jsonl"
    lines = [json.loads(x) | {"time": json.loads(x)["time"] - LONG_AGO} for x in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))
    before = path.read_bytes()
    assert short.run(folder) == 0
    assert path.read_bytes() == before
    assert TINY.run(folder, accept_changes=True) == 0
    wall = WallTime(metrics.read_wall(folder))
    assert wall.total < LONG_AGO / 2
    assert wall.counts["down"] == 0
    assert wall.parts["lost"] == 0


def test_damaged_lines_are_told_and_the_rest_is_kept(tmp_path, caplog):
    path = tmp_path / "wall.jsonl"
    sound = [line({"device": 1.0}, "a", 1) | {"time": 1.0}, line({"device": 2.0}, "a", 3) | {"time": 3.0}]
    texts = [json.dumps(x) for x in sound]
    path.write_text("\n".join([texts[0], '{"seconds": 5}', "[]", texts[1], '{"time": 4.0, "sec']))
    assert metrics.read_wall(tmp_path) == sound
    assert "damaged in 2 lines" in caplog.text
    log = metrics.WallTimeLog(tmp_path, started=4.0)
    log.account("start")
    log.close()
    assert WallTime(metrics.read_wall(tmp_path)).parts["down"] == 1.0
