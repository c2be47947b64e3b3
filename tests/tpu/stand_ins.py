"""Stand-ins for gcloud, kubectl and SLURM, which write down what the launch scripts call."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


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


UP = (
    "tpu/launch up --name pod --zone z1 --type v5litepod-16 --spot --bucket gs://b/runs "
    "-- gpt2_124m --a 'it s' --b '\"x y\"'"
)


JOBSET = "tpu/gke.sh {} --name pod --accelerator a --topology 4x4 --image i --bucket gs://b -- gpt2_124m"
