"""How long dashboards and rules take where a real Prometheus holds the series of 1,000 hosts.

    python bench/fleet_queries.py --hosts 1000

One simulated host (``examples/simulated_fleet.py``: two boards, two models, three tenants) is read twice; its series are written
again for each host, with its own name and its own speed, and promtool makes blocks of them. Then every panel of every dashboard
is asked as Grafana asks it, and the rules run. Needs prometheus, promtool and gcc.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import psutil

ROOT = Path(__file__).parents[1]
STEP_S = 60.0
HOST = 'host_id="simulated-0"'
PICKED = {
    "$cluster": ".*",
    "$job": ".*melodi.*",
    "$host": ".*",
    "$model": ".*",
    "$by": "tenant",
    "$__rate_interval": f"{4 * STEP_S:g}s",
}


def port() -> int:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        return int(holder.getsockname()[1])


def fetch(url: str) -> str:
    # The kinds of all metrics stand in OpenMetrics' text, which is also what promtool reads.
    with urlopen(Request(url, headers={"Accept": "application/openmetrics-text"}), timeout=10) as answer:
        return answer.read().decode()


def pages(seconds: float) -> tuple[str, str, float]:
    """A simulated host's page after some load, the same later, and the seconds between."""
    command = [sys.executable, str(ROOT / "examples/simulated_fleet.py"), "--seconds", str(seconds + 60.0)]
    fleet = subprocess.Popen([*command, "--budget", "*=400"], stdout=subprocess.PIPE, text=True)
    try:
        assert fleet.stdout is not None
        url = fleet.stdout.readline().strip()
        time.sleep(seconds / 2)
        first, begin = fetch(url), time.monotonic()
        time.sleep(seconds / 2)
        return first, fetch(url), time.monotonic() - begin
    finally:
        fleet.terminate()
        fleet.wait(30)


SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*(?:\{.*\})?) (\S+)(?: # .*)?$")


def series(first: str, second: str, seconds: float) -> list[tuple[str, list[tuple[str, float, float]]]]:
    """Families: (their comments, their samples as (series, value, change per second))."""
    before = {match[1]: float(match[2]) for line in first.splitlines() if (match := SAMPLE.match(line))}
    families: list[tuple[str, list[tuple[str, float, float]]]] = []
    for line in second.splitlines():
        if line.startswith("# TYPE"):
            families.append((f"{line}\n", []))
        elif (match := SAMPLE.match(line)) and not match[1].split("{")[0].endswith("_created"):
            name, value = match[1], float(match[2])
            counts = not families[-1][0].strip().endswith((" gauge", " info"))
            families[-1][1].append((name, value, (value - before.get(name, value)) / seconds if counts else 0.0))
    return families


def write(path: Path, families: list[Any], hosts: int, minutes: float, end: float) -> int:
    """All hosts' samples of the last minutes, as OpenMetrics with times; how many series that are."""
    times = [end - 60.0 * minutes + STEP_S * number for number in range(round(60.0 * minutes / STEP_S) + 1)]
    count = 0
    with path.open("w") as file:
        for head, samples in families:
            file.write(head)
            for host in range(hosts):
                speed = 0.5 + (host * 7919 % 1000) / 1000.0
                named = f'host_id="simulated-{host}"'
                target = f'instance="host-{host}:9464",job="melodi_otel",cluster="lab"'
                for name, value, rate in samples:
                    metric, _, labels = name.partition("{")
                    labels = labels.rstrip("}").replace(HOST, named)
                    labels = re.sub(r'"GPU-\d{4}', f'"GPU-{host:04d}', labels)
                    full = f"{metric}{{{target}{',' if labels else ''}{labels}}}"
                    count += 1
                    file.writelines(
                        f"{full} {value * speed + rate * speed * (at - times[0]):.6f} {at:.0f}\n" if rate
                        else f"{full} {value:.6f} {at:.0f}\n"
                        for at in times
                    )  # fmt: skip
        file.write("# EOF\n")
    return count


@contextlib.contextmanager
def prometheus(place: Path) -> Iterator[tuple[str, psutil.Process]]:
    listen = port()
    words = ["prometheus", f"--config.file={place}/p.yml", f"--storage.tsdb.path={place}/data"]
    words += [f"--web.listen-address=127.0.0.1:{listen}", "--storage.tsdb.retention.time=1y"]
    with (place / "log").open("wb") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{listen}"
    try:
        for _ in range(600):
            try:
                fetch(f"{url}/-/ready")
                break
            except OSError:
                time.sleep(0.1)
        yield url, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(60)


def ask(url: str, expression: str, minutes: float, end: float, instant: bool) -> tuple[float, int, str]:
    """Seconds, number of series, what went wrong."""
    when: dict[str, Any] = {"query": expression}
    when |= {"time": end} if instant else {"start": end - 60.0 * minutes, "end": end, "step": STEP_S}
    body = urlencode(when).encode()
    began = time.perf_counter()
    try:
        with urlopen(f"{url}/api/v1/query{'' if instant else '_range'}", body, timeout=130) as answer:
            said = json.load(answer)
    except HTTPError as error:
        return time.perf_counter() - began, 0, error.read(200).decode()
    return time.perf_counter() - began, len(said["data"]["result"]), ""


def panels() -> Iterator[tuple[str, str, str, bool]]:
    """(dashboard, panel, expression, asked for one moment)."""
    for path in sorted((ROOT / "deploy/grafana/dashboards").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", ()):
                yield path.stem, panel["title"], target["expr"], bool(target.get("instant"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--load", type=float, default=20.0, help="seconds for which the one host is simulated")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        families = series(*pages(options.load))
        end = float(int(time.time() / STEP_S) * STEP_S)
        count = write(place / "all.om", families, options.hosts, options.minutes, end)
        per_host = sum(len(samples) for _, samples in families)
        print(
            f"{options.hosts} hosts, {per_host} series each, {count} in all, {options.minutes:g} min of them",
            flush=True,
        )
        made = subprocess.run(
            ["promtool", "tsdb", "create-blocks-from", "openmetrics", str(place / "all.om"), str(place / "data")],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if made.returncode:
            print(made.stderr[-2000:], file=sys.stderr)
            return 1
        (place / "all.om").unlink()
        rules = ROOT / "deploy/prometheus/rules"
        (place / "p.yml").write_text(f"global: {{evaluation_interval: 15s}}\nrule_files: ['{rules}/*.rules.yml']\n")
        picked = PICKED | {"$__range": f"{options.minutes:g}m"}
        with prometheus(place) as (url, process):
            time.sleep(20.0)  # one round of the rules
            took: list[tuple[float, str, str, int, str]] = []
            for board, title, expression, instant in panels():
                asked = re.sub(r"\$\w+", lambda found: picked[found[0]], expression)
                seconds, found, wrong = ask(url, asked, options.minutes, end, instant)
                took.append((seconds, board, title, found, wrong))
            groups = json.loads(fetch(f"{url}/api/v1/rules"))["data"]["groups"]
            memory = process.memory_info().rss / 2**20
    took.sort(reverse=True)
    print(f"{len(took)} queries; the slowest, s (and series that it shows):")
    for seconds, board, title, found, wrong in took[:8]:
        print(f"  {seconds:6.2f}  {board}: {title} ({found}){wrong and ' FAILED ' + wrong}")
    print(f"  median {took[len(took) // 2][0]:.3f} s")
    for group in groups:
        print(f"rules {group['name']}: {group['evaluationTime']:.2f} s a round")
    print(f"Prometheus' memory: {memory:.0f} MiB")
    if options.json:
        figures = {
            "hosts": options.hosts, "series_per_host": per_host, "series": count, "queries": len(took),
            "slowest_s": took[0][0], "slowest": f"{took[0][1]}: {took[0][2]}", "median_s": took[len(took) // 2][0],
            "failed": [f"{board}: {title}: {wrong}" for _, board, title, _, wrong in took if wrong],
            "shown": sum(found > 0 for *_, found, _ in took), "memory_mib": memory,
            "rules_s": {group["name"]: group["evaluationTime"] for group in groups},
        }  # fmt: skip
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return int(any(wrong for *_, wrong in took))


if __name__ == "__main__":
    raise SystemExit(main())
