"""The `pdserve` program: finds its commands, runs one, turns an error into one line.

Modules that define commands import typer and nothing heavier: `pdserve --help` reads them all.
What a command needs is imported when it runs.
"""

import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated

import typer

from pdserve import __version__
from pdserve.cli import commands
from pdserve.cli.output import command_output
from pdserve.domain.errors import PdserveError

ENTRY_POINT_GROUP = "pdserve.commands"
"""Other packages add commands here: an entry point is a command function or a Typer app."""

EPILOG = """\b
Examples:
  pdserve up                                 start the demo model: 1 prefill, 1 decode worker
  pdserve up --prefill 2 --decode 2          the same, with two of each
  pdserve generate "def read_lines(path):"   one answer, as it comes, and where its time went
  pdserve status                             workers, load and KV blocks
  pdserve models                             what is served
  pdserve smoke                              does the cluster serve as it should?
  pdserve bench --trace azure-code           latency and goodput under a real request trace
  pdserve up plan.yaml                       start what the planner wrote; pdserve down stops it
  pdserve plan --example                     what to ask the planner; then pdserve plan inputs.yaml

Exit codes: 0 all went well; 1 the request or the cluster failed; 2 a setting or an option is wrong.
"""


def main() -> None:
    """Run the command that the arguments name and exit."""
    with command_output():
        try:
            build_app()(prog_name="pdserve")
        except PdserveError as error:
            from pdserve.cli.problems import exit_code, explain

            sys.stdout.flush()
            print(f"pdserve: {explain(error)}", file=sys.stderr)
            sys.exit(exit_code(error))


def build_app() -> typer.Typer:
    """The program with the commands of this package and of every installed one."""
    app = typer.Typer(
        help="Serve language models on separately sized prefill and decode pools.",
        epilog=EPILOG,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        add_completion=True,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )
    app.callback()(_program)
    entries = sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda entry: entry.name)
    # What starts a cluster comes first: without it the others have nothing to talk to.
    for entry in entries:
        if entry.name == "up":
            _add_entry(app, entry)
    for name, command in commands.COMMANDS.items():
        app.command(name)(command)
    for entry in entries:
        if entry.name != "up":
            _add_entry(app, entry)
    return app


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"pdserve {__version__}")
        raise typer.Exit


def _program(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print the version and exit.",
            is_eager=True,
            callback=_print_version,
        ),
    ] = False,
) -> None:
    """Options of the program itself; each does its work in its callback."""


def _add_entry(app: typer.Typer, entry: EntryPoint) -> None:
    try:
        command = entry.load()
    except ImportError as error:
        # A router image ships without torch: the command stays visible and says what it misses.
        app.command(entry.name, help=f"Not installed here: needs {error.name}.")(
            _missing(entry.name, error.name or str(error))
        )
        return
    if isinstance(command, typer.Typer):
        app.add_typer(command, name=entry.name)
    else:
        app.command(entry.name)(command)


def _missing(command: str, module: str) -> Callable[[], None]:
    def fail() -> None:
        typer.echo(
            f"pdserve: `{command}` needs the Python module {module}; "
            "install it with: pip install 'pdserve[worker]'",
            err=True,
        )
        raise typer.Exit(2)

    return fail
