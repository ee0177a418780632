"""``melodi-otel deploy``: everything by which it is operated, as files; and budgets out of what was."""

from __future__ import annotations

import shutil
from dataclasses import fields
from pathlib import Path

import typer

EXAMPLE = "Example: melodi-otel deploy --out deploy --set idle_kwh=5 --set job=llm-.*"


def deploy(
    out: Path | None = typer.Option(
        None, "--out", "-o", metavar="DIR", help="Where the files go; what is there by the same name is replaced."
    ),
    choices: list[str] = typer.Option(
        [], "--set", metavar="NAME=VALUE", help="A setting; may be given several times. --list shows all."
    ),
    budgets_from: str | None = typer.Option(
        None,
        "--budgets-from",
        metavar="URL",
        help="Propose budgets from what this Prometheus has seen in the last week; with --out also as budgets.env there.",
    ),
    show: bool = typer.Option(
        False, "--list", help="Show the settings, their defaults and what they mean; write nothing."
    ),
) -> None:
    """Write what an operator imports: dashboards, rules, alerts, configurations, a Helm chart, a compose file.

    Exit codes: 0 done, 1 the files could not be written, 2 wrong usage or a setting that cannot be used.
    """
    from melodi_otel.deploy.files import files, pages, shipped
    from melodi_otel.deploy.settings import Settings, chosen
    from melodi_otel.errors import DeployError

    if show:
        meaning = " ".join((Settings.__doc__ or "").partition("Attributes:")[2].split())
        for field in fields(Settings):
            _, _, rest = meaning.partition(f"{field.name}: ")
            ends = [at for other in fields(Settings) if (at := rest.find(f" {other.name}: ")) > 0]
            print(f"{field.name}={field.default}\n    {rest[: min(ends, default=len(rest))]}")
        return
    proposed = _proposed(budgets_from) if budgets_from else ""
    if out is None and proposed:
        return
    if out is None:
        raise typer.BadParameter("say where the files go: melodi-otel deploy --out DIR")
    settings = chosen(choices)
    made = files(settings) if choices else {}
    if proposed:
        made["budgets.env"] = f"# For the meters' environment, see docs/operate.md\n{proposed}\n"
    try:
        shutil.copytree(shipped(), out, dirs_exist_ok=True)
        shutil.copytree(pages(), out / "runbooks", dirs_exist_ok=True)
        for name, text in made.items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise DeployError(f"{error.filename or out} could not be written: {error.strerror or error}") from error
    print(f"written to {out}:")
    for path in sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file()):
        print(f"  {path}")
    print(f"next: promtool check config {out / 'prometheus/prometheus.yml'}, and docs/operate.md")


def _proposed(url: str) -> str:
    """Print a table of what a Prometheus has seen; the variable that sets the budgets."""
    from melodi_otel.deploy.budgets import proposals, variable

    made = proposals(url)
    wide = max(len("model"), *(len(one.model) for one in made))
    print("J per 1,000 output tokens, by the hour, in the last 7 days:")
    print(f"  {'model':{wide}}  {'hours':>5}  {'median':>8}  {'95 %':>8}  {'budget':>8}")
    for one in made:
        print(f"  {one.model:{wide}}  {one.hours:5}  {one.usual:8.4g}  {one.dear:8.4g}  {one.budget:8.4g}")
    if few := [one.model for one in made if one.hours < 24]:
        print(f"few hours, so take care: {', '.join(few)}")
    print(variable(made))
    return variable(made)
