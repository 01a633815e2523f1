"""`pdserve simulate` and `pdserve workload`: options and help; light to import."""

from pathlib import Path
from typing import Annotated

import typer

from pdserve.cli.options import AsJson, JsonFile

workload = typer.Typer(
    help="Look at request traces, fit distributions to them, draw new ones.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def simulate(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="Cluster and rules; see --example.")
    ] = None,
    workload_file: Annotated[
        Path | None, typer.Option("--workload", help="Requests: CSV or JSONL.")
    ] = None,
    requests_csv: Annotated[
        Path | None, typer.Option("--requests-csv", help="Write each request's times to this CSV.")
    ] = None,
    json_file: JsonFile = None,
    as_json: AsJson = False,
    example: Annotated[
        bool, typer.Option("--example", help="Print a configuration that explains its fields.")
    ] = False,
) -> None:
    """Simulate one cluster on one workload: percentiles, attainment, goodput, overload.

    \b
    Examples:
      pdserve simulate --example > sim.yaml
      pdserve simulate --config sim.yaml --workload w.csv
      pdserve simulate --config sim.yaml --workload w.csv --requests-csv out.csv --json
    """
    from placement.simulation.settings import EXAMPLE

    if example:
        typer.echo(EXAMPLE, nl=False)
        return
    from pdserve.domain.errors import LocalFault

    if config is None or workload_file is None:
        missing = "--config" if config is None else "--workload"
        raise LocalFault(f"{missing} is missing; `pdserve simulate --example` prints a config")
    from placement.simulation.running import run_simulation

    run_simulation(
        config, workload_file, requests_file=requests_csv, json_file=json_file, as_json=as_json
    )


@workload.command("describe")
def describe_workload(
    file: Annotated[Path, typer.Argument(help="A trace: our, Azure's or Mooncake's form.")],
    as_json: AsJson = False,
    report: Annotated[
        Path | None, typer.Option("--report", help="Write a page of charts (HTML).")
    ] = None,
) -> None:
    """Lengths, arrivals, burstiness and shared prefixes of a trace."""
    from placement.simulation.workload_view import show_workload

    show_workload(file, as_json=as_json, report=report)


@workload.command("fit")
def fit_workload(
    file: Annotated[Path, typer.Argument(help="A trace: our, Azure's or Mooncake's form.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write YAML here [the terminal].")
    ] = None,
    requests: Annotated[
        int | None, typer.Option("--requests", min=1, help="How many requests to generate.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of what is generated.")] = 0,
) -> None:
    """Fit distributions to a trace, as YAML that `pdserve workload generate` reads."""
    from placement.simulation.workload_view import fit_to_yaml

    _give(fit_to_yaml(file, num_requests=requests, seed=seed), output)


@workload.command("generate")
def generate_workload(
    spec: Annotated[
        Path | None, typer.Argument(help="YAML of distributions; `fit` writes one.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write CSV here [the terminal].")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Instead of the file's seed.")] = None,
    example: Annotated[
        bool, typer.Option("--example", help="Print distributions that explain their fields.")
    ] = False,
) -> None:
    """Draw a workload from distributions; the same seed gives the same requests."""
    from placement.simulation.workload_view import SPEC_EXAMPLE, generate_csv

    if example:
        typer.echo(SPEC_EXAMPLE, nl=False)
        return
    from pdserve.domain.errors import LocalFault

    if spec is None:
        raise LocalFault("SPEC is missing; `pdserve workload generate --example` prints one")
    _give(generate_csv(spec, seed=seed), output)


def _give(text: str, output: Path | None) -> None:
    if output is None:
        typer.echo(text, nl=False)
    else:
        from pdserve.config.files import write_file

        write_file(output, text)
