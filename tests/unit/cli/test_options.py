"""One name for one thing, across all commands: a person learns an option once."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from pdserve.cli.main import build_app
from pdserve.cli.options import address_given, text_given, utf8

SAME_HELP = (
    *("--address", "--internal-address", "--ray-address", "--gpus-file", "--json", "--json-file"),
    *("--slo-class", "--example"),
)
"""Options whose meaning leaves nothing for a command to add, but for the end of a sentence."""


def options() -> Iterator[tuple[str, Any]]:
    """Every visible option of every command, with the command's name."""

    def walk(command: Any, name: str) -> Iterator[tuple[str, Any]]:
        for child in getattr(command, "commands", {}).values():
            yield from walk(child, f"{name} {child.name}".strip())
        if not hasattr(command, "commands"):
            for each in command.params:
                if each.param_type_name == "option" and not each.hidden:
                    yield name, each

    yield from walk(get_command(build_app()), "")


def split(option: Any) -> tuple[list[str], list[str]]:
    names = [*option.opts, *option.secondary_opts]
    return [n for n in names if n.startswith("--")], [n for n in names if not n.startswith("--")]


def test_each_letter_stands_for_one_option_and_each_option_has_one_letter() -> None:
    longs, letters = defaultdict(set), defaultdict(set)
    for _, option in options():
        long, short = split(option)
        for letter in short:
            longs[letter].add(long[0])
        letters[long[0]].add(tuple(short))
    assert {letter: names for letter, names in longs.items() if len(names) > 1} == {}
    assert {name: found for name, found in letters.items() if len(found) > 1} == {}


def test_each_option_takes_the_same_kind_of_value_in_every_command() -> None:
    kinds = defaultdict(set)
    for _, option in options():
        long, _ = split(option)
        kind = option.type_descriptor.annotation
        kinds[long[0]].add((option.is_flag, option.multiple, str(kind)))
    assert {name: found for name, found in kinds.items() if len(found) > 1} == {}


@pytest.mark.parametrize("name", SAME_HELP)
def test_options_of_several_commands_say_the_same_of_themselves(name: str) -> None:
    said = {option.help for _, option in options() if name in option.opts}
    begins = {text.split(";")[0].split(".")[0] for text in said}
    if name == "--example":
        assert all(text.startswith("Print") for text in begins)
        return
    assert len(begins) == 1, begins


def test_environment_variables_belong_to_one_option() -> None:
    names = defaultdict(set)
    for _, option in options():
        if option.envvar:
            names[str(option.envvar)].add(split(option)[0][0])
    assert names == {
        "PDSERVE_ADDRESS": {"--address"},
        "PDSERVE_INTERNAL_ADDRESS": {"--internal-address"},
    }


@pytest.mark.parametrize("command", ["generate", "models", "smoke", "bench", "status", "profile"])
def test_address_that_is_none_is_refused_with_what_is_wrong(command: str) -> None:
    is_internal = command in ("status", "profile")
    option = "--internal-address" if is_internal else "--address"
    prompt = ["x"] if command == "generate" else []
    done = CliRunner().invoke(build_app(), [command, *prompt, option, "::1:7450"])
    assert done.exit_code == 2
    assert "an IPv6 address stands in brackets" in " ".join(done.output.replace("│", "").split())


def test_addresses_have_one_form() -> None:
    assert address_given("[0:0::1]:7450") == "[::1]:7450"
    assert address_given(None) is None


def test_text_is_utf8_whatever_the_shell_is_set_to() -> None:
    as_ascii = "日本".encode().decode("ascii", "surrogateescape")
    assert utf8(as_ascii) == "日本"
    assert text_given([as_ascii, "a"]) == ["日本", "a"]
    with pytest.raises(typer.BadParameter, match=r"not UTF-8 text \(byte 1\)"):
        utf8("a\udcff")
    with pytest.raises(typer.BadParameter, match=r"not Unicode text \(character 1\)"):
        utf8("a\ud800")
