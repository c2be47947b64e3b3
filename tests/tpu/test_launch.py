"""The launch scripts against stand-ins for gcloud, kubectl and SLURM: what they run, in what order, after a failure."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from stand_ins import JOBSET, ROOT, UP

SCRIPTS = sorted((ROOT / "tpu").iterdir())


ROUND = ["list", "create", "list", "scp", "setup", "start", "follow"]


def test_up_creates_installs_runs_and_follows(world):
    done = world.run(UP)
    assert (done.returncode, done.stderr) == (0, "done; the TPU still exists and is billed: tpu/launch delete\n")
    git, *calls = world.calls()
    assert git[-1] == "HEAD"
    assert world.verbs()[1:] == ROUND
    created = "tpu-vm create pod --zone=z1 --accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite --spot"
    assert calls[1] == shlex.split(f"gcloud compute tpus {created}")
    ssh = shlex.split("gcloud compute tpus tpu-vm ssh pod --worker=all --zone=z1 --quiet")
    assert all(call[:-1] == ssh for call in calls[4:6])
    started = "bash gptjax/tpu/worker.sh start gpt2_124m gs://b/runs gpt2_124m --a 'it s' --b '\"x y\"'"
    assert shlex.split(calls[5][-1].removeprefix("--command=")) == shlex.split(started)
    assert calls[6][5:7] == ["pod", "--worker=0"]


@pytest.mark.parametrize(
    "command",
    [
        UP,
        UP.replace("up ", "up --queued --project p --run r --runtime image "),
        *(f"tpu/launch {command} --name pod --zone z" for command in ("install", "log", "stop", "status", "delete")),
        "tpu/launch run --name pod --zone z -- experiments/quickstart.py",
        "tpu/gke.sh run --name pod --accelerator a --topology 4x4 --image i --bucket gs://b -- gpt2_124m",
        *(f"tpu/gke.sh {command} --name pod" for command in ("log", "status", "delete")),
        "tpu/slurm.sh --nodes=2 --time 1:00:00 -- gpt2_124m --a 'b c'",
    ],
)
def test_a_dry_run_prints_what_a_run_runs_and_runs_nothing(world, command):
    dry = world.run(command, DRY_RUN="1")
    assert (dry.returncode, world.calls()) == (0, [])
    assert world.run(command).returncode == 0
    assert [shlex.split(line) for line in dry.stdout.splitlines()] == world.calls()


def test_a_failing_command_is_tried_again_with_longer_pauses(world):
    world.expect(("scp", 7, "", None), ("scp", 7, "", None))
    assert world.run(UP).returncode == 0
    assert [call[1] for call in world.calls() if call[0] == "sleep"] == ["10", "20"]
    assert world.verbs()[1:] == ["list", "create", "list", "scp", "sleep", "scp", "sleep", "scp", *ROUND[4:]]


def test_what_goes_on_failing_ends_with_its_exit_code_and_the_command(world):
    world.expect(*[("create pod", 7, "", None)] * 3)
    failed = world.run(UP, TRIES="3", PAUSE="1")
    assert failed.returncode == 7
    *attempts, last = failed.stderr.splitlines()
    assert attempts == [f"exit code 7, attempt {i} of 3; retrying in {i} s" for i in (1, 2)]
    assert last.startswith("error: exit code 7 after 3 attempts: gcloud compute tpus tpu-vm create pod --zone=z1")
    assert world.verbs()[1:] == ["list", "create", "sleep", "create", "sleep", "create", "list"]


@pytest.mark.parametrize(
    ("command", "part", "code", "says"),
    [
        ("UP", "list", 1, "ERROR: (gcloud.compute.tpus) The required property [project] is not currently set."),
        ("UP", "create", 1, "ERROR: (gcloud) PERMISSION_DENIED: Permission 'tpu.nodes.create' denied"),
        ("UP", "create", 2, "ERROR: (gcloud) argument --accelerator-type: Invalid choice: 'v5'"),
        ("UP", "scp", 127, "gcloud: command not found"),
        ("UP", "setup", 1, "ERROR: (gcloud) You do not currently have an active account selected."),
        ("JOBSET", "apply", 1, "Error from server (Forbidden): jobsets is forbidden"),
        ("JOBSET", "apply", 1, 'error: no matches for kind "JobSet" in version "jobset.x-k8s.io/v1alpha2"'),
        ("tpu/slurm.sh -- gpt2_124m", "sbatch", 1, "sbatch: error: invalid partition specified: gpu"),
        ("tpu/slurm.sh -- gpt2_124m", "sbatch", 127, "sbatch: not found"),
    ],
)
def test_what_cannot_succeed_is_not_tried_again(world, command, part, code, says):
    """And what it says is shown once; a new machine may refuse ssh for a while."""
    command = {"UP": UP, "JOBSET": JOBSET.format("run")}.get(command, command)
    world.expect((part, code, f"STDERR {says}", None))
    failed = world.run(command)
    assert failed.returncode == 2
    assert f"error: exit code {code}, and another attempt would fail too: " in failed.stderr
    assert failed.stderr.count(f"{says}\n") == 1
    assert "sleep" not in world.verbs()
    assert sum(part in " ".join(call) for call in world.calls()) == 1
    if command == UP:
        world.expect((part, 255, "STDERR root@1.2.3.4: Permission denied (publickey).", None))
        assert world.run(command, POLL="0").returncode == 0


@pytest.mark.parametrize(("queued", "state", "code"), [("", "PREEMPTED", 255), ("1", "SUSPENDED", 130)])
def test_a_preempted_tpu_is_deleted_made_anew_and_runs_the_same_command(world, queued, state, code):
    world.expect((" follow", code, "", state))
    done = world.run(UP, QUEUED=queued)
    assert done.returncode == 0, done.stderr
    assert f"interrupted (exit code {code}, TPU {state}); round 2 of 100 in 30 s" in done.stderr
    looks = ["list"] * (2 if code == 255 else 1)  # a lost connection is looked into first
    assert world.verbs()[1:] == [*ROUND, *looks, "sleep", "list", "delete", *ROUND]
    first, second = [call for call in world.calls() if "worker.sh start" in call[-1]]
    assert first == second
    assert ["--force" in call for call in world.calls() if "delete" in call] == [bool(queued)]


def test_a_tpu_that_is_gone_before_it_is_installed_is_made_anew(world):
    world.expect(*[("scp", 1, "", "PREEMPTED")] * 2)
    assert world.run(UP, TRIES="2").returncode == 0
    round_2 = ["list", "delete", *ROUND]
    assert world.verbs()[1:] == ["list", "create", "list", "scp", "sleep", "scp", "list", "sleep", *round_2]


def test_up_waits_until_a_tpu_is_deleted(world):
    states = ["", "READY", *["DELETING"] * 3]
    world.expect((" follow", 255, "", None), *[("list", 0, state, None) for state in states], ("list", 0, "", ""))
    assert world.run(UP).returncode == 0
    assert world.verbs()[1:] == [*ROUND, "list", "list", "sleep", "list", "sleep", "list", *ROUND[1:]]


def test_once_there_was_a_tpu_up_waits_for_another_longer_and_longer(world):
    """No capacity in two rounds; nobody who says what there is in a third."""
    states = ["", "READY", *[""] * 6]
    world.expect(
        (" follow", 255, "", ""),
        ("create pod", 0, "", "READY"),
        *[("create pod", 1, "no capacity", None)] * 2,
        *[("list", 0, state, None) for state in states],
        ("list", 1, "", None),
    )
    done = world.run(UP, TRIES="1")
    assert done.returncode == 0, done.stderr
    waits = [line.partition("; ")[2] for line in done.stderr.splitlines() if line.startswith("interrupted")]
    assert waits == [f"round {n} of 100 in {pause} s" for n, pause in ((2, 30), (3, 60), (4, 120), (5, 240))]


@pytest.mark.parametrize(("state", "code"), [("PREEMPTED", 0), ("FAILED", 1)])
def test_a_tpu_that_is_preempted_before_it_is_ready_is_made_anew_and_a_mistake_is_not(world, state, code):
    world.expect(("list", 0, "", None), ("create pod", 0, "", "CREATING"), ("list", 0, "CREATING", state))
    done = world.run(UP)
    assert done.returncode == code, done.stderr
    assert f"error: the TPU was not created: {state}" in done.stderr
    assert world.verbs().count("create") == (1 if code else 2)


def test_a_tpu_that_comes_although_its_creation_failed_is_used(world):
    world.expect(("create pod", 1, "timeout", "READY"), ("create pod", 1, "it exists", None))
    assert world.run(UP, TRIES="2").returncode == 0
    assert world.verbs()[1:] == ["list", "create", "sleep", "create", *ROUND[2:]]


def test_the_trainer_gets_its_variables_and_the_tpu_its_software(world):
    options = "--env GPTJAX_CACHE=/mnt/cache --env 'A=b c' --runtime v2-alpha-tpuv6e"
    assert world.run(UP.replace("-- ", f"{options} -- ")).returncode == 0
    (created,) = [call for call in world.calls() if "create" in call]
    assert "--version=v2-alpha-tpuv6e" in created
    (started,) = [call[-1] for call in world.calls() if "worker.sh start" in call[-1]]
    assert shlex.split(started.removeprefix("--command="))[:4] == ["env", "GPTJAX_CACHE=/mnt/cache", "A=b c", "bash"]


def test_a_lost_connection_is_made_again_and_a_killed_run_started_again(world):
    world.expect((" follow", 255, "", None), (" follow", 137, "", None))
    assert world.run(UP).returncode == 0
    again = ["list", "sleep", "list", "scp", "setup", "start", "follow"]
    assert world.verbs()[1:] == [*ROUND, "list", "sleep", "follow", *again]


@pytest.mark.parametrize(("code", "starts"), [(1, 3), (2, 1), (3, 1)])
def test_a_run_that_fails_is_started_again_a_few_times_if_it_may_be_the_machine(world, code, starts):
    world.expect(*[(" follow", code, "", None)] * starts)
    failed = world.run(UP, FAILURES="2")
    assert failed.returncode == code
    last = failed.stderr.splitlines()[-1]
    assert last.startswith(f"error: the run failed with exit code {code}; the TPU still exists and is billed")
    assert world.verbs().count("start") == starts


def test_interruptions_have_a_limit(world):
    world.expect(*[(" follow", 137, "", None)] * 2)
    failed = world.run(UP, ROUNDS="2")
    assert failed.returncode == 1
    assert failed.stderr.endswith(
        "error: interrupted 2 times; run the same command again to resume, or increase ROUNDS\n"
    )


def test_a_queued_resource_is_waited_for(world):
    states = ("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    world.expect(("list", 0, "", None), *[("list", 0, state, None) for state in states])
    create = "tpu/launch create --queued --name pod --zone z --type v6e-8"
    assert world.run(create, POLL="9").returncode == 0
    assert world.verbs() == ["list", "create", "list", "sleep", "list", "sleep", "list"]
    assert "--runtime-version=v2-alpha-tpuv6e" in world.calls()[1]
    world.expect(("list", 0, "", None), ("create", 0, "", None), ("list", 0, "FAILED", None))
    failed = world.run(create)
    assert (failed.returncode, failed.stderr) == (1, "error: the TPU was not created: FAILED\n")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("tpu/launch up --zone z", "TPU_NAME: is not set; pass --name or set the variable TPU_NAME, such as pod"),
        ("tpu/launch up --name p --zone z", "TPU_TYPE: is not set; pass --type or set the variable TPU_TYPE"),
        ("tpu/launch log --name p", "ZONE: is not set; pass --zone or set the variable ZONE, such as us-west4-a"),
        ("tpu/launch run --name p --zone z", "no experiment; give it after --, such as -- gpt2_124m"),
        ("tpu/launch run --name p --zone", "--zone: needs a value"),
        ("tpu/launch run --name p --zone z --bucket b -- quickstart", "BUCKET: got b, must begin with gs://"),
        (
            "tpu/launch up --dry-run --name p --zone z --type t -- quikstart",
            "quikstart: no such experiment; there are: arithmetic, ",
        ),
        ("tpu/launch run --name p --zone z -- no/such.py", "no/such.py: no such file"),
        ("tpu/slurm.sh --dry-run -- _hidden", "_hidden: no such experiment"),
        ("tpu/launch run --name p --zone z -- a --out b", "--out: the folder is runs/RUN; pass --run before the --"),
        ("tpu/launch rum", "rum: no such command; must be up, create, install, run, log, stop, status or delete"),
        ("tpu/launch run gpt2_124m", "gpt2_124m: no such option; see tpu/launch --help"),
        ("tpu/gke.sh run", "JOB_NAME: is not set; pass --name or set the variable JOB_NAME, such as pod"),
        ("tpu/gke.sh render --name a -- b", "ACCELERATOR: is not set; pass --accelerator or set the variable"),
        ("tpu/slurm.sh --nodes=2", "no experiment; give it after --, such as -- gpt2_124m"),
    ],
)
def test_a_mistake_gets_one_line_and_exit_code_2(world, command, message):
    failed = world.run(command)
    assert failed.returncode == 2
    assert failed.stderr.startswith(f"error: {message}")
    assert failed.stderr.count("\n") == 1
    assert world.calls() == []


@pytest.mark.parametrize("script", ["tpu/launch", "tpu/gke.sh", "tpu/slurm.sh"])
def test_help_is_the_comment_at_the_top(world, script):
    shown = world.run(f"{script} --help")
    assert shown.returncode == 0
    assert f"  {script} " in shown.stdout
    assert "set -e" not in shown.stdout


def test_the_documentation_says_what_the_scripts_understand(world):
    """And the image has what a TPU VM has: what reads tokenizers, and buckets."""
    page = (ROOT / "docs" / "cloud.md").read_text()
    lines = page.replace("\\\n", " ").splitlines()
    for line in lines:
        for word in shlex.split(line.removeprefix("export ")) if line.startswith("export ") else ():
            world.environment.update([word.split("=", 1)])
    commands = [line for line in lines if line.startswith("tpu/")]
    assert len(commands) > 8
    for command in commands:
        done = world.run(shlex.join(shlex.split(command, comments=True)), DRY_RUN="1")
        assert done.returncode == 0, f"{command}: {done.stderr}"
    extras = [re.findall(r"-e '\.\[([\w,]+)\]'", text) for text in (page, (ROOT / "tpu" / "worker.sh").read_text())]
    assert extras == [["tpu,hf,gcs"]] * 2


def test_shellcheck_is_clean():
    program = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("needs shellcheck: pip install -e '.[dev]'")
    subprocess.run([program, "--external-sources", *SCRIPTS, ROOT / ".ci" / "run"], check=True, cwd=ROOT)
