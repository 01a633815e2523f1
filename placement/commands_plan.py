"""`pdserve plan` and `pdserve compare`: options and help; light to import."""

from pathlib import Path
from typing import Annotated

import typer

from pdserve.cli.options import AsJson, JsonFile


def plan(
    inputs_file: Annotated[
        Path | None, typer.Argument(help="What is asked; see --example.", metavar="[INPUTS.YAML]")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the plan to this YAML.")
    ] = None,
    json_file: JsonFile = None,
    as_json: AsJson = False,
    report: Annotated[
        Path | None, typer.Option("--report", help="Write a page of tables and curves (HTML).")
    ] = None,
    what_ifs: Annotated[
        bool, typer.Option("--what-ifs/--no-what-ifs", help="Losses, bursts, sensitivity.")
    ] = True,
    example: Annotated[
        bool, typer.Option("--example", help="Print inputs that explain every field.")
    ] = False,
) -> None:
    """Find the best plan: how many workers of which kind, for the promises that are asked.

    Exit codes: 0 there is a plan; 1 there is none (the nearest is told); 2 the inputs are wrong.

    \b
    Examples:
      pdserve plan --example > inputs.yaml
      pdserve plan inputs.yaml --output plan.yaml --report report.html
      pdserve plan inputs.yaml --json --no-what-ifs
    """
    from placement.plan_inputs import EXAMPLE

    if example:
        typer.echo(EXAMPLE, nl=False)
        return
    from pdserve.domain.errors import LocalFault

    if inputs_file is None:
        raise LocalFault("INPUTS.YAML is missing; `pdserve plan --example` prints one")
    from placement.plan_view import run_plan

    code = run_plan(
        inputs_file,
        output=output,
        json_file=json_file,
        as_json=as_json,
        report=report,
        what_ifs=what_ifs,
    )
    if code:
        raise typer.Exit(code)


def compare(
    first: Annotated[Path, typer.Argument(help="A plan, or inputs of one.", metavar="A.YAML")],
    second: Annotated[Path, typer.Argument(help="The other.", metavar="B.YAML")],
    as_json: AsJson = False,
) -> None:
    """Two plans side by side: pools, limits, predictions, costs.

    A file of inputs is planned first.

    \b
    Examples:
      pdserve compare plan-a.yaml plan-b.yaml
      pdserve compare plan.yaml inputs.yaml --json
    """
    from placement.plan_view import run_compare

    code = run_compare(first, second, as_json=as_json)
    if code:
        raise typer.Exit(code)
