"""The launch scripts for GKE and SLURM: manifests, what is tried again, what goes back to the queue."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from stand_ins import JOBSET


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
