"""The examples for Ray Serve and Kubernetes: they parse, their command lines are ours, and the probe probes."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer
from ruamel.yaml import YAML

from optkit.cli.app import app
from optkit.errors import RecipeError
from optkit.serve.scaling.application import DEPLOYMENT, Arguments, build
from optkit.serve.scaling.replicas import Replicas
from tests.serving import Server
from tests.serving import serve as serve

ROOT = Path(__file__).parents[2]
KUBERNETES, RAY = ROOT / "recipes/kubernetes", ROOT / "recipes/ray"
MANIFESTS = sorted([*KUBERNETES.rglob("*.yaml"), *RAY.rglob("*.yaml")])
KEY = "a-key-of-the-probes"

API_VERSIONS = {
    "ConfigMap": "v1",
    "Deployment": "apps/v1",
    "HorizontalPodAutoscaler": "autoscaling/v2",
    "NetworkPolicy": "networking.k8s.io/v1",
    "PodDisruptionBudget": "policy/v1",
    "PodMonitor": "monitoring.coreos.com/v1",
    "Service": "v1",
}


def documents(path: Path) -> list[dict[str, Any]]:
    """Duplicate keys are errors in ruamel.yaml."""
    return list(YAML(typ="safe").load_all(path.read_text(encoding="utf-8")))


def kubernetes_objects() -> list[dict[str, Any]]:
    return [one for path in MANIFESTS if path.is_relative_to(KUBERNETES) for one in documents(path) if "kind" in one]


def found(kind: str) -> dict[str, Any]:
    [one] = [one for one in kubernetes_objects() if one["kind"] == kind]
    return one


def container() -> dict[str, Any]:
    [one] = found("Deployment")["spec"]["template"]["spec"]["containers"]
    return one


def command_lines() -> Iterator[list[str]]:
    """Those of containers, and those that prose names with arguments."""
    yield [*container()["command"], *container()["args"]]
    for path in (*KUBERNETES.rglob("*.md"), *RAY.rglob("*.md")):
        for line in re.findall(r"`(optkit serve [^`]+)`", path.read_text(encoding="utf-8")):
            yield shlex.split(line)


def parsed(words: list[str]) -> dict[str, Any]:
    """What the command line makes of `words`, without doing it."""
    assert words[0] == "optkit"
    group = typer.main.get_command(app)
    with group.make_context("optkit", words[1:]) as context:
        name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
        with command.make_context(name, rest, parent=context) as inner:
            return inner.params


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_document_is_a_mapping_and_begins_with_what_it_is_for(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith("# ")
    assert all(isinstance(one, dict) for one in documents(path))


def test_every_object_has_its_version_a_name_and_the_common_label() -> None:
    objects = kubernetes_objects()
    assert {one["kind"]: one["apiVersion"] for one in objects} == API_VERSIONS
    assert len(objects) == len(API_VERSIONS)
    for one in objects:
        assert one["metadata"]["labels"] == {"app.kubernetes.io/name": "optkit"}
        assert re.fullmatch(r"[a-z0-9-]+", one["metadata"]["name"])


def test_everything_selects_the_pods_of_the_deployment() -> None:
    labels = found("Deployment")["spec"]["template"]["metadata"]["labels"]
    assert found("Deployment")["spec"]["selector"]["matchLabels"] == labels
    assert found("Service")["spec"]["selector"] == labels
    assert found("PodMonitor")["spec"]["selector"]["matchLabels"] == labels
    assert found("PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == labels
    assert found("NetworkPolicy")["spec"]["podSelector"]["matchLabels"] == labels
    scaled = found("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert scaled == {"apiVersion": "apps/v1", "kind": "Deployment", "name": found("Deployment")["metadata"]["name"]}


def test_ports_and_volumes_are_those_that_the_container_has() -> None:
    [port] = container()["ports"]
    assert port["containerPort"] == parsed([*container()["command"], *container()["args"]])["port"]
    assert found("Service")["spec"]["ports"][0]["targetPort"] == port["name"]
    assert found("NetworkPolicy")["spec"]["ingress"][0]["ports"][0]["port"] == port["name"]
    assert found("PodMonitor")["spec"]["podMetricsEndpoints"][0]["port"] == port["name"]
    volumes = {one["name"]: one for one in found("Deployment")["spec"]["template"]["spec"]["volumes"]}
    assert [one["name"] for one in container()["volumeMounts"]] == list(volumes)
    assert volumes["probe"]["configMap"]["name"] == found("ConfigMap")["metadata"]["name"]


def test_the_pod_may_do_nothing_that_it_need_not() -> None:
    pod = found("Deployment")["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is False
    assert container()["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    written = {one["mountPath"] for one in container()["volumeMounts"] if not one.get("readOnly")}
    assert written == {"/tmp"}
    [keys] = [one for one in container()["env"] if one["name"] == "OPTKIT_API_KEYS"]
    assert "secretKeyRef" in keys["valueFrom"]
    assert found("NetworkPolicy")["spec"]["egress"] == []


def test_a_pod_has_time_to_drain() -> None:
    wait = int(container()["lifecycle"]["preStop"]["exec"]["command"][-1])
    drain = parsed([*container()["command"], *container()["args"]])["drain_timeout"]
    assert found("Deployment")["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > wait + drain + 5


@pytest.mark.parametrize("words", list(command_lines()), ids=" ".join)
def test_the_real_command_line_takes_every_one_of_them(words: list[str]) -> None:
    assert parsed(words)["artifacts"]


def test_a_wrong_option_would_be_found() -> None:
    with pytest.raises(typer.BadParameter.__mro__[1], match="such option"):
        parsed(["optkit", "serve", "artifact", "--no-such-option"])


def test_the_probe_asks_with_the_key_of_the_server(
    serve: Callable[..., Server],
    scripted: Callable[..., Path],
    tmp_path: Path,
) -> None:
    server = serve(scripted(), keys=(KEY, "another-key-of-somebody"))
    probe = tmp_path / "probe.py"
    port = server.url.rpartition(":")[2]
    probe.write_text(found("ConfigMap")["data"]["probe.py"].replace(":8000", f":{port}"))

    def code(path: str, keys: str) -> int:
        words = [sys.executable, probe, path]
        return subprocess.run(words, env={"OPTKIT_API_KEYS": keys}, capture_output=True, check=False).returncode

    probes = [container()[name]["exec"]["command"][-1] for name in ("startupProbe", "readinessProbe", "livenessProbe")]
    assert probes == ["/ready", "/ready", "/health"]
    assert [code(path, f"{KEY},another-key-of-somebody") for path in probes] == [0, 0, 0]
    assert code("/ready", "a-key-of-nobody-here") == 1
    assert code("/no-such-path", KEY) == 1


def test_rays_configuration_names_a_builder_that_takes_its_arguments() -> None:
    [config] = documents(RAY / "serve.yaml")
    [application] = config["applications"]
    module, _, name = application["import_path"].partition(":")
    assert getattr(import_module(module), name) is build
    given = Arguments.model_validate(application["args"], strict=False)
    assert Replicas.parse(given.replicas) == Replicas(1, 4)
    assert [one["name"] for one in application["deployments"]] == [DEPLOYMENT]
    assert config["http_options"]["request_timeout_s"] > given.request_timeout


def test_an_application_of_a_configuration_file_is_not_built_without_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPTKIT_API_KEYS", raising=False)
    monkeypatch.delenv("OPTKIT_ADMIN_KEYS", raising=False)
    [config] = documents(RAY / "serve.yaml")
    with pytest.raises(RecipeError, match="needs API keys"):
        build(config["applications"][0]["args"])


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({}, "artifacts: field required"),
        ({"artifacts": []}, "artifacts: list should have at least 1 item"),
        ({"artifacts": ["a"], "import": "os:system"}, "import: extra inputs are not permitted"),
    ],
)
def test_arguments_that_ray_hands_over_are_checked(args: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(said)):
        build(args)
