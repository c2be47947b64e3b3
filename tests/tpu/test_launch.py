"""The launch scripts against stand-ins for gcloud, kubectl and SLURM: what they run, in what order, after a failure."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "tpu").iterdir())

STAND_IN = f"""#!{sys.executable} -S
# Writes down its call. Plays a cloud with at most one TPU, and what `answers` says, once each: (part of a call,
# exit code, output, state of the TPU from then on or null).
import json, os, pathlib, sys
folder = pathlib.Path(os.environ["STAND_IN"])
call = [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]
with (folder / "calls").open("a") as file:
    file.write(json.dumps(call) + "\\n")
answers, state = json.loads((folder / "answers").read_text()), (folder / "state").read_text()
code, output = 0, ""
for answer in answers:
    if answer[0] in " ".join(call):
        answers.remove(answer)
        (folder / "answers").write_text(json.dumps(answers))
        _, code, output, after = answer
        if after is not None:
            (folder / "state").write_text(after)
        break
else:
    if "list" in call:
        output = state
    if "create" in call:
        (folder / "state").write_text("ACTIVE" if "queued-resources" in call else "READY")
    if "delete" in call:
        (folder / "state").write_text("")
print(output.removeprefix("STDERR "), file=sys.stderr if output.startswith("STDERR ") else sys.stdout)
sys.exit(code)
"""


class World:
    """A folder whose stand-ins come first on the PATH."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "bin").mkdir()
        self.stand_in("gcloud", "kubectl", "sbatch", "srun", "scontrol", "sleep", "git")
        (folder / "state").write_text("")
        (folder / "answers").write_text("[]")
        (folder / "calls").touch()
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        path = f"{folder / 'bin'}:{os.environ['PATH']}"
        self.environment = {**kept, "PATH": path, "STAND_IN": str(folder), "TMPDIR": str(folder)}

    def stand_in(self, *names: str) -> None:
        for name in names:
            (self.folder / "bin" / name).write_text(STAND_IN)
            (self.folder / "bin" / name).chmod(0o755)

    def expect(self, *answers: tuple[str, int, str, str | None]) -> None:
        (self.folder / "answers").write_text(json.dumps(answers))

    def run(self, command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            shlex.split(command),
            cwd=ROOT,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def job(self, **environment: str) -> subprocess.CompletedProcess[str]:
        """tpu/slurm.sh as SLURM runs it: a copy elsewhere."""
        script = shutil.copy(ROOT / "tpu" / "slurm.sh", self.folder)
        slurm = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT), "RUN": "r", "VENV": ""}
        return self.run(f"{script} job gpt2_124m --a b", **slurm, **environment)

    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]

    def verbs(self) -> list[str]:
        """The calls, each as the words that tell it apart."""
        names = shlex.split("create delete list scp setup start follow stop sleep")
        return [" ".join(name for name in names if name in " ".join(call).split()) for call in self.calls()]


@pytest.fixture
def world(tmp_path) -> World:
    return World(tmp_path)


UP = (
    "tpu/launch up --name pod --zone z1 --type v5litepod-16 --spot --bucket gs://b/runs "
    "-- gpt2_124m --a 'it s' --b '\"x y\"'"
)
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
            "quikstart: no such experiment; there are: gpt",
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


def test_the_manifest_of_a_jobset(world):
    yaml = pytest.importorskip("yaml")
    options = "--name pod --accelerator tpu-v5p-slice --topology 4x4x8 --image i --bucket gs://b --spot"
    shown = world.run(f'tpu/gke.sh render {options} -- gpt2_124m --a "it\'s"', SLICES="2")
    jobset = yaml.safe_load(shown.stdout)
    (slices,) = jobset["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    pod = job["template"]["spec"]
    assert (slices["replicas"], job["parallelism"], job["completions"]) == (2, 32, 32)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x8",
        "cloud.google.com/gke-spot": "true",
    }
    command = ["python", "-m", "experiments", "gpt2_124m", "--a", "it's", "--out", "/runs/gpt2_124m"]
    assert pod["containers"][0]["command"] == command
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2, 3]
    assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "b"


def test_a_host_has_no_more_chips_than_the_slice_and_the_container_its_variables(world):
    yaml = pytest.importorskip("yaml")
    options = (
        "--name pod --accelerator tpu-v6e-slice --topology 1x1 --image i --bucket gs://b --env A= --env 'B=c: d=e'"
    )
    jobset = yaml.safe_load(world.run(f"tpu/gke.sh render {options} -- gpt2_124m").stdout)
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert (job["parallelism"], container["resources"]["limits"]) == (1, {"google.com/tpu": 1})
    assert container["env"] == [{"name": "A", "value": ""}, {"name": "B", "value": "c: d=e"}]


JOBSET = "tpu/gke.sh {} --name pod --accelerator a --topology 4x4 --image i --bucket gs://b -- gpt2_124m"
DELETED = shlex.split("kubectl delete jobset pod --ignore-not-found --cascade=foreground --wait")


def test_a_jobset_that_is_there_makes_way_for_the_new_one(world):
    done = world.run(JOBSET.format("run"))
    assert done.returncode == 0, done.stderr
    deleted, applied = world.calls()
    assert deleted == DELETED
    assert applied[:2] == ["kubectl", "apply"]
    manifest = Path(applied[2].removeprefix("--filename=")).read_text()
    assert manifest == world.run(JOBSET.format("render")).stdout


def test_kubectl_is_tried_again_and_nothing_is_applied_beside_what_could_not_be_deleted(world):
    world.expect(("delete", 1, "", None), ("apply", 1, "", None), ("apply", 1, "", None))
    assert world.run(JOBSET.format("run")).returncode == 0
    assert [call[1] for call in world.calls()] == ["delete", "10", "delete", "apply", "10", "apply", "20", "apply"]
    (world.folder / "calls").write_text("")
    world.expect(*[("delete", 3, "", None)] * 2)
    failed = world.run(JOBSET.format("run"), TRIES="2")
    assert failed.returncode == 3
    assert failed.stderr.endswith(f"error: exit code 3 after 2 attempts: {shlex.join(DELETED)}\n")
    assert [call[1] for call in world.calls()] == ["delete", "10", "delete"]


def test_the_log_is_that_of_one_host(world):
    assert world.run("tpu/gke.sh log --name pod").returncode == 0
    (call,) = world.calls()
    labels = dict(label.split("=") for label in call[-1].removeprefix("--selector=").split(","))
    assert labels == {
        "jobset.sigs.k8s.io/jobset-name": "pod",
        "jobset.sigs.k8s.io/job-index": "0",
        "batch.kubernetes.io/job-completion-index": "0",
    }


@pytest.mark.parametrize("inside", [{}, {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": "/"}], ids=["", "salloc"])
def test_a_job_is_given_to_slurm_again_where_that_fails(world, inside):
    world.expect(("sbatch", 1, "", None))
    done = world.run("tpu/slurm.sh --nodes=2 -- gpt2_124m --a 'b c'", **inside)
    assert done.returncode == 0, done.stderr
    first, pause, second = world.calls()
    exported = "--export=ALL,RUN=gpt2_124m,VENV=.venv,RESTARTS=100"
    assert first == second == ["sbatch", "--nodes=2", exported, "tpu/slurm.sh", "job", "gpt2_124m", "--a", "b c"]
    assert pause == ["sleep", "10"]
    world.expect(*[("sbatch", 1, "", None)] * 2)
    assert world.run("tpu/slurm.sh -- gpt2_124m", TRIES="2", **inside).returncode == 1


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [
        *((0, "0", False), (1, "3", True), (1, "4", False), (2, "0", False), (3, "0", False)),
        *((130, "0", True), (143, "4", True), (137, "5", False)),
    ],
)
def test_a_slurm_job_goes_back_to_the_queue_when_it_was_interrupted(world, code, restarts, requeued):
    world.expect(("srun", code, "", None))
    job = world.job(RESTARTS="5", FAILURES="4", SLURM_RESTART_COUNT=restarts)
    assert job.returncode == code
    srun = shlex.split("srun --kill-on-bad-exit=1 python -m experiments gpt2_124m --a b --out runs/r")
    assert world.calls() == [srun, *([["scontrol", "requeue", "7"]] if requeued else [])]


def test_a_slurm_job_waits_for_its_tasks_after_sigterm(world):
    """The tasks get the signal too, unless they inherit that it is ignored; and they have the job's processors."""
    (world.folder / "bin" / "srun").write_text(
        "#!/usr/bin/env bash\n"
        "[[ $SRUN_CPUS_PER_TASK == 12 ]] || exit 1\n"
        "kill -TERM $PPID\n"
        "trap 'exit 130' TERM\n"
        "kill -TERM $$\n"
        "exit 1\n"
    )
    job = world.job(SLURM_CPUS_PER_TASK="12")
    assert job.returncode == 130, job.stderr
    assert world.calls() == [["scontrol", "requeue", "7"]]


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


class Host(World):
    """A host of a TPU, with a trainer that runs until it is stopped or the file `ended` says with which exit code."""

    def __init__(self, folder: Path, hosts: str):
        super().__init__(folder)
        (folder / "bin" / "sleep").unlink()
        self.stand_in("curl", "mountpoint", "gcsfuse")
        self.hosts = ("curl", 0, hosts, None)
        shutil.copytree(ROOT / "tpu", folder / "gptjax" / "tpu")
        trainer = folder / "gptjax" / ".venv" / "bin" / "python"
        trainer.parent.mkdir(parents=True)
        trainer.write_text(
            "#!/usr/bin/env bash\n"
            "trap 'echo saved; exit 130' TERM\n"
            'echo "$@"\n'
            'for i in {1..300}; do [[ -f ended ]] && exit "$(cat ended)"; sleep 0.1; done\n'
        )
        trainer.chmod(0o755)

    def worker(self, arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run(f"bash {self.folder}/gptjax/tpu/worker.sh {arguments}", SYNC="100")

    def log(self) -> str:
        """Once the trainer has started."""
        path, limit = self.folder / "gptjax" / "run.log", time.monotonic() + 20
        while not (path.exists() and path.read_text()) and time.monotonic() < limit:
            time.sleep(0.05)
        return path.read_text()


def test_one_host_keeps_the_run_folder_in_the_bucket_by_copying_it(tmp_path):
    host = Host(tmp_path, "10.0.0.1")
    host.expect(*[host.hosts] * 4)
    assert host.worker("start r gs://b/runs gpt2_124m --a 'b c'").returncode == 0
    assert host.log() == "-m experiments gpt2_124m --a b c --out runs/r\n"
    (tmp_path / "gptjax" / "ended").write_text("0")
    followed = host.worker("follow")
    assert followed.returncode == 0, followed.stderr
    copies = [call[1:] for call in host.calls() if call[0] == "gcloud"]
    assert copies == [
        ["storage", "ls", "gs://b/runs/r/"],
        ["storage", "rsync", "--recursive", "gs://b/runs/r", "runs/r"],
        ["storage", "rsync", "--recursive", "--delete-unmatched-destination-objects", "runs/r", "gs://b/runs/r"],
    ]


@pytest.mark.parametrize(("output", "code"), [("One or more URLs matched no objects.", 0), ("no network", 1)])
def test_a_run_is_begun_anew_only_where_the_bucket_is_known_to_have_none(tmp_path, output, code):
    """The next copy to the bucket would delete what could not be read."""
    host = Host(tmp_path, "10.0.0.1")
    (tmp_path / "gptjax" / "ended").write_text("0")
    host.expect(*[host.hosts] * 4, ("storage ls", 1, output, None))
    assert host.worker("start r gs://b/runs gpt2_124m").returncode == code
    assert (tmp_path / "gptjax" / "run.pid").exists() is (code == 0)
    if code == 0:
        assert host.worker("follow").returncode == 0
    assert not any(call[-2] == "gs://b/runs/r" for call in host.calls())


def test_several_hosts_mount_the_bucket(tmp_path):
    host = Host(tmp_path, "10.0.0.1,10.0.0.2")
    host.expect(host.hosts)
    failed = host.worker("start r '' gpt2_124m")
    assert (failed.returncode, failed.stderr) == (
        2,
        "error: BUCKET: is not set; several hosts need one folder: --bucket gs://...\n",
    )
    (tmp_path / "gptjax" / "ended").write_text("1")
    host.expect(*[host.hosts] * 2, ("mountpoint", 1, "", None))
    assert host.worker("start r gs://b/runs gpt2_124m").returncode == 0
    assert host.worker("follow").returncode == 1
    (mount,) = [call for call in host.calls() if call[0] == "gcsfuse"]
    assert mount[-4:] == ["--only-dir", "runs", "b", "runs"]
    assert not [call for call in host.calls() if call[0] == "gcloud"]


def test_stopping_lets_the_trainer_save(tmp_path):
    host = Host(tmp_path, "10.0.0.1")
    assert host.worker("start r '' gpt2_124m").returncode == 0
    host.log()
    assert host.worker("stop").returncode == 0
    assert host.log().endswith("saved\n")
    assert host.worker("follow").returncode == 130
    assert host.worker("stop").returncode == 0  # nothing runs


def test_shellcheck_is_clean():
    program = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("needs shellcheck: pip install -e '.[dev]'")
    subprocess.run([program, "--external-sources", *SCRIPTS, ROOT / ".ci" / "run"], check=True, cwd=ROOT)
