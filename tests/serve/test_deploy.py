"""Deployment files fit the service: its options, its routes, its limits; and Kubernetes's own schemas."""

import re
import shlex
from pathlib import Path

import kubernetes_validate
import pytest
import tyro
import yaml

from gptjax.cli.access import Limits
from gptjax.cli.main import _later
from gptjax.cli.serve import serve
from gptjax.serve.app import OPEN_ROUTES

FOLDER = Path(__file__).parents[2] / "deploy"


@pytest.fixture(scope="module")
def compose():
    (service,) = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"].values()
    return service


@pytest.fixture(scope="module")
def manifests():
    found = list(yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text()))
    return {manifest["kind"]: manifest for manifest in found}


@pytest.fixture(scope="module")
def pod(manifests):
    return manifests["Deployment"]["spec"]["template"]["spec"]


def accept(arguments: list[str]) -> None:
    """The command line is one of `gptjax serve`; nothing is run."""
    tyro.cli(_later(serve), prog="gptjax serve", args=arguments)


def dockerfile() -> str:
    return (FOLDER / "Dockerfile").read_text().replace("\\\n", " ")


def test_commands_have_the_options_of_gptjax_serve(compose, pod):
    accept(re.findall(r'"([^"]*)"', re.search(r"^CMD (\[.*)", dockerfile(), re.MULTILINE)[1]))
    accept(compose["command"])
    accept(pod["containers"][0]["args"])
    command = re.search(r"^ExecStart=(.*)", (FOLDER / "gptjax.service").read_text(), re.MULTILINE)[1]
    program, name, *arguments = shlex.split(command)
    assert (Path(program).name, name) == ("gptjax", "serve")
    accept(arguments)


def test_images_copy_what_is_there_and_run_as_nobody_in_particular(compose):
    for source in re.findall(r"^COPY (.*) \S+$", dockerfile(), re.MULTILINE):
        assert all((FOLDER.parent / name).exists() for name in source.split())
    assert re.search(r"^USER [1-9]\d*$", dockerfile(), re.MULTILINE)
    extras = re.search(r"^ARG EXTRAS=(.*)", dockerfile(), re.MULTILINE)[1].split(",")
    project = (FOLDER.parent / "pyproject.toml").read_text()
    assert all(f"\n{extra} = [" in project for extra in [*extras, "cuda"])
    assert (FOLDER / compose["build"]["context"] / compose["build"]["dockerfile"]).exists()
    assert (compose["read_only"], compose["cap_drop"]) == (True, ["ALL"])


def test_manifests_are_those_of_kubernetes(manifests):
    for manifest in manifests.values():
        kubernetes_validate.validate(manifest, "1.33", strict=True)
    labels = manifests["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert manifests["Service"]["spec"]["selector"] == labels
    assert manifests["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels


def test_pods_are_probed_stopped_and_confined(pod, compose):
    (container,) = pod["containers"]
    paths = {kind: container[kind]["httpGet"]["path"] for kind in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert paths == {"startupProbe": "/ready", "readinessProbe": "/ready", "livenessProbe": "/health"}
    assert set(paths.values()) <= OPEN_ROUTES.keys()
    stop = int(container["lifecycle"]["preStop"]["exec"]["command"][1]) + Limits().drain_seconds
    assert pod["terminationGracePeriodSeconds"] > stop
    assert int(compose["stop_grace_period"].removesuffix("s")) > Limits().drain_seconds
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    assert container["resources"]["limits"]["memory"]
