"""The script that runs on a TPU's hosts: the run folder, the bucket, the end of the trainer."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import pytest
from stand_ins import ROOT, World


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
