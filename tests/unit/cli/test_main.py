import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest
import typer
from typer.testing import CliRunner

from pdserve import __version__
from pdserve.cli import commands, main
from pdserve.cli.problems import ClusterFailed, exit_code, explain
from pdserve.client.faults import ClusterUnreachable
from pdserve.config.processes import RouterSettings
from pdserve.domain.errors import BadRequest, LocalFault, Reason, Refused

HEAVY = ("torch", "grpc", "numpy", "pydantic", "rich", "yaml", "asyncio", "google.protobuf")
runner = CliRunner()


def test_help_loads_none_of_the_heavy_libraries() -> None:
    program = (
        "import sys\n"
        "from pdserve.cli.main import main\n"
        "sys.argv = ['pdserve', '--help']\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as end:\n"
        "    assert not end.code\n"
        f"print('LOADED', [name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "LOADED []" in done.stdout


def test_help_teaches_every_command_with_an_example() -> None:
    app = main.build_app()
    overview = runner.invoke(app, ["--help"]).output
    names = [*commands.COMMANDS, "up"]
    for name in names:
        assert f"pdserve {name}" in overview
        page = runner.invoke(app, [name, "--help"])
        assert page.exit_code == 0
        assert "Example" in page.output
        assert f"pdserve {name}" in page.output


def test_version_is_printed() -> None:
    done = runner.invoke(main.build_app(), ["--version"])
    assert done.exit_code == 0
    assert done.output == f"pdserve {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["generate"],
        ["generate", "hi", "--max-tokens", "0"],
        ["generate", "hi", "--top-k", "-1"],
        ["generate", "hi", "--temperature", "warm"],
        ["bench", "--requests", "0"],
        ["up", "--decode", "0"],
    ],
)
def test_wrong_usage_exits_2(arguments: list[str]) -> None:
    assert runner.invoke(main.build_app(), arguments).exit_code == 2


def test_command_whose_package_is_missing_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entry = EntryPoint("profile", "no_such_module_xyz:profile", main.ENTRY_POINT_GROUP)
    monkeypatch.setattr(main, "entry_points", lambda group: [entry])
    app = main.build_app()
    assert "needs no_such_module_xyz" in runner.invoke(app, ["--help"]).output
    done = runner.invoke(app, ["profile"])
    assert done.exit_code == 2
    assert "no_such_module_xyz" in done.output


def test_entry_point_may_be_a_group_of_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    group = typer.Typer(help="Plans.")
    group.command("solve")(lambda: typer.echo("solved"))
    group.command("check")(lambda: typer.echo("checked"))
    monkeypatch.setattr(EntryPoint, "load", lambda self: group)
    entry = EntryPoint("plan", "anything", main.ENTRY_POINT_GROUP)
    monkeypatch.setattr(main, "entry_points", lambda group: [entry])
    assert runner.invoke(main.build_app(), ["plan", "check"]).output == "checked\n"


def test_default_addresses_are_those_of_the_settings() -> None:
    settings = RouterSettings()
    assert f"{settings.host}:{settings.port}" == commands.DEFAULT_ADDRESS
    assert f"{settings.host}:{settings.internal_port}" == commands.DEFAULT_INTERNAL_ADDRESS


def test_errors_say_what_to_do_in_one_line() -> None:
    refused = Refused("queue is full (4 of 4)", retry_after_s=1.5)
    assert explain(refused).startswith("queue is full (4 of 4); retry after 1.5 s; ")
    unreachable = ClusterUnreachable("127.0.0.1:7450: connection refused")
    assert "`pdserve up`" in explain(unreachable)
    assert explain(LocalFault("c.yaml: no such file")) == "c.yaml: no such file"
    unknown = BadRequest("no model x", reason=Reason.MODEL_NOT_FOUND)
    assert "`pdserve models`" in explain(unknown)
    for error in (refused, unreachable, unknown):
        assert "\n" not in explain(error)


def test_exit_codes_tell_a_wrong_question_from_a_failure() -> None:
    assert exit_code(LocalFault("setting")) == 2
    assert exit_code(BadRequest("field")) == 2
    assert exit_code(Refused("full")) == 1
    assert exit_code(ClusterUnreachable("gone")) == 1
    assert exit_code(ClusterFailed("prefill-0 did not start")) == 1
