"""The chart, the alert rules and the board, by the tools that would read them."""

import json
import re
import subprocess
from pathlib import Path

import kubernetes_validate
import promql_parser
import pytest
import yaml

from app.metrics import Metrics
from tests.conftest import ROOT, TOOLS, needed

DEPLOY, CHART = ROOT / "deploy", ROOT / "deploy" / "chart"
HELM, HOW = str(TOOLS / "helm"), "none; make .venv/tooled"
VALUES = ("values-cpu.yaml", "values-gpu.yaml", "values-8gpu.yaml")
OTHERS = {"ScaledObject", "ServiceMonitor", "PrometheusRule"}  # kinds that Kubernetes itself has no schema of


def run(*command: str | Path, stdin: str = "") -> str:
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def render(*more: str) -> list[dict]:
    """The chart's resources."""
    rendered = run(needed(HELM, HOW), "template", "demo", CHART, "--namespace", "pictures", *more)
    return [each for each in yaml.safe_load_all(rendered) if each]


@pytest.mark.parametrize("values", VALUES)
def test_the_chart_is_accepted_by_helm_and_by_the_schemas_of_its_resources(values):
    run(needed(HELM, HOW), "lint", "--strict", CHART, "--values", CHART / values)
    resources = render("--values", str(CHART / values))
    for resource in resources:
        if resource["kind"] not in OTHERS:
            kubernetes_validate.validate(resource, "1.33", strict=True)
    others = [each for each in resources if each["kind"] in OTHERS]
    if others:
        told = run(needed("node", "nodejs"), DEPLOY / "validate.mjs", TOOLS, stdin=json.dumps(others))
        assert sorted(told.split()) == sorted(each["kind"] for each in others)


@pytest.mark.parametrize(
    "wrong",
    ["replicas=-1", "settings.PORT=1", "sevice.port=80", "autoscaling.targetSeconds=0", "weights.accessModes[0]=Some"],
)
def test_values_that_make_no_sense_are_refused(wrong):
    command = [needed(HELM, HOW), "template", "demo", str(CHART), "--set", wrong]
    assert subprocess.run(command, capture_output=True, timeout=60, check=False).returncode != 0


def test_a_pod_is_given_the_time_to_drain_and_no_more_rights_than_it_needs():
    (deployment,) = (each for each in render("--set-string", "settings.DRAIN_S=90") if each["kind"] == "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 5 + 90 + 15
    assert pod["automountServiceAccountToken"] is False
    (server,) = pod["containers"]
    assert server["securityContext"]["readOnlyRootFilesystem"] is True
    assert server["readinessProbe"]["failureThreshold"] == 1
    assert server["livenessProbe"]["httpGet"]["path"] == "/live"


def test_the_alert_rules_hold_in_their_tests():
    run(needed("promtool", "prometheus"), "check", "rules", CHART / "files" / "alerts.yml")
    run(needed("promtool", "prometheus"), "test", "rules", DEPLOY / "alerts_test.yml")


def test_board_alerts_and_scaling_ask_for_series_that_there_are():
    known = {sample for metric in Metrics().registry.collect() for sample in _names(metric.name, metric.type)}
    for query in [*board_queries(), *alert_queries()]:
        promql_parser.parse(re.sub(r"\$__rate_interval", "1m", query))
        assert set(re.findall(r"\bsdxl_\w+", query)) <= known, query


def board_queries() -> list[str]:
    """Every query of the board."""
    board = json.loads((CHART / "files" / "board.json").read_text())
    return [target["expr"] for panel in board["panels"] for target in panel["targets"]]


def alert_queries() -> list[str]:
    """Every query of the alert rules."""
    rules = yaml.safe_load((CHART / "files" / "alerts.yml").read_text())
    return [rule["expr"] for group in rules["groups"] for rule in group["rules"]]


def _names(name: str, kind: str) -> list[str]:
    if kind == "counter":
        return [f"{name}_total"]
    return [f"{name}_{part}" for part in ("bucket", "sum", "count")] if kind == "histogram" else [name]
