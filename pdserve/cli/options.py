"""Options that several commands have: one name, one meaning, one way of checking."""

from pathlib import Path
from typing import Annotated, TypeVar

import typer

from pdserve.domain.addresses import parse_address

T = TypeVar("T", str, list[str], str | None, list[str] | None)


def address_given(value: str | None) -> str | None:
    """An option's host:port in its one form; names what is wrong with it."""
    try:
        return parse_address(value) if value else value
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def text_given(value: T) -> T:
    """An option's text, whatever encoding the shell is set to; names bytes that are not UTF-8."""
    if isinstance(value, list):
        return [utf8(each) for each in value]
    return utf8(value) if isinstance(value, str) else value


def utf8(argument: str) -> str:
    """The bytes of `argument` as UTF-8 text; Python has those that it cannot read as surrogates."""
    try:
        return argument.encode("utf-8", "surrogateescape").decode()
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"not UTF-8 text (byte {error.start})") from None
    except UnicodeEncodeError as error:
        raise typer.BadParameter(f"not Unicode text (character {error.start})") from None


PublicAddress = Annotated[
    str,
    typer.Option(
        "--address",
        "-a",
        envvar="PDSERVE_ADDRESS",
        callback=address_given,
        help="The router's public host:port.",
    ),
]
OptionalPublicAddress = Annotated[
    str | None,
    typer.Option(
        "--address",
        "-a",
        callback=address_given,
        help="The router's public host:port; left out: the only cluster that is up.",
    ),
]
INTERNAL_ADDRESS_NAMES = ("--internal-address", "-i")
InternalAddress = Annotated[
    str,
    typer.Option(
        *INTERNAL_ADDRESS_NAMES,
        envvar="PDSERVE_INTERNAL_ADDRESS",
        callback=address_given,
        help="The router's internal host:port.",
    ),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray-address", help="Ray head, host:port; left out: RAY_ADDRESS, or the one here."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
JsonFile = Annotated[
    Path | None, typer.Option("--json-file", help="Write everything as JSON to this file.")
]
GpusFile = Annotated[
    Path | None, typer.Option("--gpus-file", help="YAML file with GPU types of your own.")
]
ModelName = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        callback=text_given,
        help="The model's name; left out: the only one served.",
    ),
]
SloClassName = Annotated[
    str,
    typer.Option(callback=text_given, help="One of the router's SLO classes; left out: its first."),
]
