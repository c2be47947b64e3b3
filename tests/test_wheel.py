"""An installed wheel: the files of the checkout at their places, and commands that find them far from any checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def files(folder: Path) -> set[str]:
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in paths if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment with the wheel; its dependencies are those of this one, which a path entry names."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "wheel", *offline, "-w", folder, ROOT], check=True)
    (wheel,) = folder.glob("*.whl")
    venv = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    subprocess.run([*pip, "--python", venv, "install", "--no-deps", "--no-index", wheel], check=True)
    (installed,) = venv.rglob("site-packages/gptjax")
    entries = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (installed.parent / "dependencies.pth").write_text("\n".join(entries))
    return venv


def run(environment: Path, *command: str) -> str:
    """Output of a command of the environment, run in its own folder."""
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    program = environment / "bin" / command[0]
    done = subprocess.run([program, *command[1:]], cwd=environment, env=plain, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_wheel_carries_every_file_of_the_package_and_the_experiments(environment):
    (installed,) = environment.rglob("site-packages/gptjax")
    shipped = {f"experiments/{name}" for name in files(ROOT / "experiments")}
    assert files(installed) == files(ROOT / "gptjax") | shipped
    top = {path.name for path in installed.parent.iterdir() if not path.name.endswith((".dist-info", ".pth"))}
    assert top - {"__pycache__"} == {"gptjax"}  # no package whose name could collide


def test_an_installed_wheel_runs_its_commands_and_finds_its_files(environment):
    here = "import gptjax; print(gptjax.__file__)"
    assert run(environment, "python", "-c", here).startswith(str(environment))
    names = {path.stem for path in ROOT.glob("experiments/[!_]*.py")}
    assert names <= set(run(environment, "gptjax", "run", "--help").replace(",", " ").split())
    every = "; ".join(f"import gptjax.experiments.{name}" for name in sorted(names))
    run(environment, "python", "-c", every)  # each file of them, and those that it imports
    assert "From raw text to a chat model" in run(environment, "gptjax", "run", "quickstart", "--help")
    assert "From raw text to a chat model" in run(
        environment, "python", "-m", "gptjax.experiments", "quickstart", "--help"
    )
    assert "--port" in run(environment, "gptjax", "serve", "--help")
    page = "from gptjax.serve.routes.page import FOLDER; print(*(path.name for path in FOLDER.iterdir()))"
    assert {"index.html", "main.js", "style.css"} <= set(run(environment, "python", "-c", page).split())
