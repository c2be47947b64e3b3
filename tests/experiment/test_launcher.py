"""The launcher lists, explains, prints and runs experiments, of its folder or any other; mistakes get one line."""

from __future__ import annotations

import fnmatch
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import gptjax.experiments
from gptjax.cli import run as launcher
from gptjax.config import from_json, to_json
from gptjax.distributed import processes
from gptjax.experiment import catalogue
from gptjax.types import UserError

ROOT = Path(__file__).resolve().parents[2]

TINY = '''"""A tiny experiment.

Its result is a file.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from gptjax.types import UserError


@dataclasses.dataclass(frozen=True)
class Tiny:
    steps: int = 2
    """How far to go."""

    def run(self, folder: Path, *, accept_changes: bool) -> int | None:
        if self.steps < 0:
            raise UserError(f"steps: got {self.steps}, must not be negative")
        if self.steps == 0:
            raise KeyboardInterrupt
        folder.mkdir(parents=True)
        (folder / "marker").write_text(f"{self.steps} {accept_changes}")
        return 7 if self.steps == 7 else None


experiment = Tiny()
'''


@pytest.fixture(autouse=True)
def anywhere(tmp_path, monkeypatch):
    """Each test starts in an empty folder and leaves no module or path behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def tiny(tmp_path) -> str:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "tiny_one.py").write_text(TINY)
    return "elsewhere/tiny_one.py"


def test_the_list_has_the_first_line_of_each_docstring_and_imports_nothing(tmp_path, monkeypatch, capsys):
    for name, text in {
        "one": '"""First line.\n\nMore."""\nraise SystemExit',
        "two_b": "",
        "_hidden": '"""No."""',
    }.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setattr(gptjax.experiments, "__path__", [str(tmp_path)])
    assert launcher.main([]) == 0
    listing = capsys.readouterr().out
    assert [line.split(maxsplit=1) for line in listing.splitlines()[1:]] == [["one", "First line."], ["two_b"]]
    assert launcher.main(["--help"]) == 0
    assert capsys.readouterr().out.endswith(listing)


def test_help_does_not_wait_for_jax():
    program = "import sys, gptjax.cli.run as m; m.main(['--help']); sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def test_every_shipped_experiment_says_what_it_is():
    assert all(map(catalogue.headline, catalogue.names().values()))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("experiment = 5", "bad.py: experiment: got a value of type int, must be an `Experiment(...)`"),
        ("def experiment(): pass", "bad.py: experiment: got a value of type function, must be an"),
        ("from gptjax import Experiment as experiment", "bad.py: experiment: got the class Experiment, must be an"),
        ("\n\nraise RuntimeError('mine\\nand yours')", "/bad.py, line 3: RuntimeError: mine and yours"),
        ("import part", "/part.py, line 2: KeyError: 'x'"),
        ("\nx = (", "/bad.py, line 2: SyntaxError: '(' was never closed"),
        ("x = 1\0", "/bad.py: SyntaxError: source code string cannot contain null bytes"),
        ("\nraise SystemExit(3)", "/bad.py, line 2: SystemExit: 3"),
        ("import bad\nbad.experiment", "/bad.py, line 2: AttributeError: partially initialized module 'bad'"),
        (
            "from gptjax import *\nExperiment(model=1, tokenizer=2)",
            "/bad.py, line 2: TypeError: Experiment.__init__() missing",
        ),
        ("from gptjax import *\nExperiment(1, 2, {})", "/bad.py, line 2: stages: got none, must be at least one"),
        (
            "from gptjax import *\nx = {}\nx['a'] = x\nExperiment(1, 2, x)",
            "/bad.py, line 4: stages: got a value of type dict for a, must be a Stage",
        ),
        (f"{TINY}\nobject.__setattr__(experiment, 'steps', experiment)", "configuration: contains itself, must be a"),
    ],
)
def test_what_an_experiment_does_wrong_is_shown_with_its_line(content, message, tmp_path, capsys):
    (tmp_path / "bad.py").write_text(content)
    (tmp_path / "part.py").write_text("\n{}['x']")
    assert launcher.main(["bad.py", "--print"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: ")
    assert message in err


def test_run(tiny):
    assert launcher.main([tiny]) == 0
    assert Path("runs/tiny_one/marker").read_text() == "2 False"
    assert launcher.main([tiny, "--steps", "7", "--out", "deep/er", "--accept-changes"]) == 7
    assert Path("deep/er/marker").read_text() == "7 True"


def test_a_name_is_a_file_of_the_folder(tmp_path, monkeypatch, capsys):
    """By name and by path it is the same module, so that its classes have one name."""
    package = tmp_path / "experiments"
    package.mkdir()
    (package / "tiny_two.py").write_text(TINY)
    monkeypatch.setattr(gptjax.experiments, "__path__", [str(package)])
    for name in ("tiny_two", "experiments/tiny_two.py"):
        assert launcher.main([name, "--print"]) == 0
        assert capsys.readouterr().out == "Tiny(steps=2)\n"
    assert sys.modules["gptjax.experiments.tiny_two"].experiment.__class__.__module__ == "gptjax.experiments.tiny_two"
    assert "tiny_two" not in sys.modules


def test_saved_configurations_may_name_the_classes_of_the_file_and_of_the_modules_beside_it(tmp_path, tiny):
    (tmp_path / "elsewhere" / "part_of_it.py").write_text(TINY)
    (tmp_path / "elsewhere" / "not_imported.py").write_text(TINY)
    with Path(tiny).open("a") as file:
        file.write("\nimport part_of_it\n")
    for module in ("tiny_one", "part_of_it"):
        with pytest.raises(UserError, match=rf"got class {module}\.Tiny"):
            from_json({"class": f"{module}.Tiny"})
    experiment = catalogue.load(tiny).experiment
    assert from_json(to_json(experiment)) == experiment
    assert from_json({"class": "part_of_it.Tiny", "steps": 3}).steps == 3
    for module in ("not_imported", "gptjax.types"):
        with pytest.raises(UserError, match=rf"got class {module}\.Tiny"):
            from_json({"class": f"{module}.Tiny"})


def test_print_shows_the_configuration_and_runs_nothing(tiny, capsys):
    assert launcher.main([tiny, "--print", "--steps=5"]) == 0
    assert capsys.readouterr().out == "Tiny(steps=5)\n"
    assert not Path("runs").exists()


def test_an_experiment_that_is_trained_in_another_way_promises_nothing(capsys):
    for options, promises in (([], True), (["--mesh.fsdp", "2"], True), (["--pretrain.steps", "60"], False)):
        assert launcher.main(["quickstart", "--print", *options]) == 0
        assert ("Expect(" in capsys.readouterr().out) == promises


def test_help_of_an_experiment(tiny, capsys):
    with pytest.raises(SystemExit) as stop:
        launcher.main([tiny, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for part in (
        "A tiny experiment.",
        "Its result is a file.",
        "--out FOLDER",
        "--print",
        "--accept",
        "--steps INT",
        "How far",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quikstart"], "no experiment 'quikstart'; the nearest: quickstart; or give the path of a .py file"),
        (["no/such.py"], "no file 'no/such.py'; give the path of an experiment, or one of: quickstart"),
        (
            ["TINY", "--stepz", "3"],
            "no option --stepz; nearest: --steps; see all with gptjax run TINY --help all",
        ),
        (["TINY", "--steps", "x"], "--steps: got 'x', must be an integer of at most 64 bits"),
        (["TINY", "--steps", "-1"], "--steps: got -1, must not be negative"),
        (
            ["TINY", "--steps", str(-(2**63) - 1)],
            f"--steps: got '{-(2**63) - 1}', must be an integer of at most 64 bits",
        ),
        (
            ["TINY", "--out", "gs://b/c"],
            "--out: got gs://b/c, must be a folder here; docs/cloud.md says how to use a bucket",
        ),
        (["TINY", "--out"], "Missing value for argument '--out'. Expected 1 values"),
        (
            ["TINY", "--profile", "5:3"],
            "--profile: got 5:3, must be two steps counted from 1, the later last, such as 10:15",
        ),
        (["empty.py"], "empty.py: defines no `experiment`; add `experiment = Experiment(...)` to the file"),
        (["pathlib.py"], "pathlib.py: there is another module named 'pathlib'; rename the file"),
        (["a-b.py"], "a-b.py: 'a-b' cannot be the name of a Python module; rename the file"),
    ],
)
def test_a_mistake_gets_one_line_and_exit_code_2(arguments, message, tiny, monkeypatch, capsys):
    monkeypatch.setattr(catalogue, "names", lambda: {"quickstart": Path("quickstart.py")})
    for name in ("empty.py", "pathlib.py", "a-b.py"):
        Path(name).touch()
    assert launcher.main([argument.replace("TINY", tiny) for argument in arguments]) == 2
    assert capsys.readouterr() == ("", f"error: {message.replace('TINY', tiny)}\n")
    assert not Path("runs").exists()


def test_interrupted_says_how_to_go_on(tiny, capsys):
    assert launcher.main([tiny, "--steps", "0", "--out", "a b"]) == 130
    assert capsys.readouterr().err == f"\nstopped; to go on: gptjax run {tiny} --steps 0 --out 'a b'\n"


def test_the_compilation_cache_is_on_unless_told(monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "5")
    processes.configure()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"].endswith("gptjax/compilation")
    assert os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] == "5"


@pytest.mark.parametrize(
    ("libtpu", "files", "platforms"),
    [
        (None, [], None),
        ("there", [], "cpu"),
        ("there", ["/dev/nvidia0"], "cuda,cpu"),
        ("there", ["/dev/accel0"], None),
    ],
)
def test_libtpu_without_a_tpu_is_left_alone(libtpu, files, platforms, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "")  # so that what is set is undone
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: libtpu)
    monkeypatch.setattr(processes.glob, "glob", lambda pattern: [f for f in files if fnmatch.fnmatch(f, pattern)])
    processes.configure()
    assert os.environ.get("JAX_PLATFORMS") == platforms


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1"}, True),
        ({"MEGASCALE_NUM_SLICES": "2", "TPU_WORKER_HOSTNAMES": "a"}, True),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, True),
        ({"SLURM_NTASKS": "4"}, False),  # in a batch script, before srun
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "a"}, False),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "a"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
    ],
)
def test_hosts_are_joined_where_there_are_several(environment, several, monkeypatch, tiny):
    import jax

    for name in os.environ:
        if name.startswith(("TPU_", "JAX_COORDINATOR", "MEGASCALE_", "SLURM_", "OMPI_")):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **bounds: calls.append(1))
    assert launcher.main([tiny]) == 0
    assert calls == [1] * several
    assert launcher.main([tiny, "--no-distributed", "--out", "b"]) == 0
    assert launcher.main([tiny, "--distributed", "--out", "c"]) == 0
    assert calls == [1] * (several + 1)


@pytest.mark.parametrize(("hosts", "several"), [("10.0.0.1", False), ("10.0.0.1,10.0.0.2", True)])
def test_a_tpu_vm_asks_its_metadata_server(hosts, several, monkeypatch):
    asked = []

    def urlopen(request, timeout):
        asked.append((request.full_url, request.headers))
        return io.BytesIO(hosts.encode())

    for name in ("TPU_SKIP_MDS_QUERY", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "GCE_METADATA_IP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(processes.urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(processes.glob, "glob", lambda pattern: [])
    assert not processes.is_multi_process()
    assert not asked  # a laptop
    monkeypatch.setattr(processes.glob, "glob", lambda pattern: ["/dev/vfio/0"])
    assert processes.is_multi_process() is several
    url = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/worker-network-endpoints"
    assert asked == [(url, {"Metadata-flavor": "Google"})]


def test_what_lacks_to_join_is_named(tiny, tmp_path):
    """In a process of its own: processes meet before jax has done anything."""
    command = [sys.executable, "-m", "experiments", str(tmp_path / tiny), "--out", str(tmp_path / "out")]
    environment = os.environ | {"JAX_COORDINATOR_ADDRESS": "localhost:1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    message = "error: distributed: Number of processes must be defined; set JAX_COORDINATOR_ADDRESS"
    assert done.stderr.startswith(message)
    assert not (tmp_path / "out").exists()


def test_time_limits_of_a_job_are_those_of_the_environment(monkeypatch, tiny, capsys):
    import jax

    given = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **limits: given.append(limits))
    command = [tiny, "--distributed"]
    assert launcher.main([*command, "--out", "a"]) == 0
    monkeypatch.setenv("GPTJAX_INITIALIZATION_TIMEOUT", "900")
    monkeypatch.setenv("GPTJAX_HEARTBEAT", "120")
    assert launcher.main([*command, "--out", "b"]) == 0
    names = "initialization_timeout", "heartbeat_timeout_seconds", "shutdown_timeout_seconds"
    assert [[limits[name] for name in names] for limits in given] == [[300, 60, 60], [900, 120, 120]]
    for name in ("GPTJAX_INITIALIZATION_TIMEOUT", "GPTJAX_HEARTBEAT"):
        for wrong in ("0", "-5", "1.5", "soon", ""):
            with monkeypatch.context() as patch:
                patch.setenv(name, wrong)
                assert launcher.main(command) == 2
                expected = f"error: {name}: got {wrong}, must be a whole number of seconds, at least 1\n"
                assert capsys.readouterr().err == expected


@pytest.mark.slow
def test_a_process_without_the_others_says_that_it_waits(tiny, tmp_path):
    command = [sys.executable, "-m", "experiments", str(tmp_path / tiny), "--out", str(tmp_path / "out")]
    job = {"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    environment = os.environ | job | {"GPTJAX_INITIALIZATION_TIMEOUT": "4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGABRT
    assert "waiting for the other processes of the job; gives up 4 s after the start" in done.stderr
    assert not (tmp_path / "out").exists()


def test_as_a_command(tiny, tmp_path):
    command = [
        sys.executable,
        "-m",
        "experiments",
        str(tmp_path / tiny),
        "--out",
        str(tmp_path / "out"),
        "--steps",
        "7",
    ]
    assert subprocess.run(command, cwd=ROOT).returncode == 7
    assert (tmp_path / "out" / "marker").exists()
