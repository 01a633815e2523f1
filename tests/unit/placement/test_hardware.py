"""The GPU catalogue, a user's own types, links."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from pdserve.domain.errors import LocalFault
from placement.commands_gpus import gpus
from placement.hardware import catalogue, find_gpu, load_gpus, network_link


def test_catalogue_has_the_types_people_rent() -> None:
    wanted = {"a100_sxm", "h100_sxm", "h200_sxm", "b200_sxm", "l40s", "mi300x", "h20", "l4", "a10g"}
    assert wanted <= set(catalogue())


def test_every_type_states_source_price_and_power() -> None:
    for gpu in catalogue().values():
        assert gpu.source != "user"
        assert gpu.usd_per_hour
        assert gpu.tdp_w > 50


def test_names_are_found_loosely_and_unknown_ones_suggest_the_nearest() -> None:
    assert find_gpu("H100").name == "h100_sxm"
    assert find_gpu("H200-SXM").name == "h200_sxm"
    with pytest.raises(LocalFault, match="did you mean mi300x"):
        find_gpu("mi300")


def test_flops_fall_back_to_the_next_wider_type() -> None:
    a100, h100 = find_gpu("a100"), find_gpu("h100")
    assert a100.flops("fp8") == a100.flops("bfloat16") == 312e12
    assert h100.flops("fp4") == h100.flops("fp8") == 1978e12


def test_a_users_file_adds_and_replaces_types(tmp_path: Path) -> None:
    path = tmp_path / "gpus.yaml"
    path.write_text(
        "gpus:\n"
        "  - {name: z1, memory_gib: 64, memory_gb_per_s: 1000, bf16_tflops: 100, tdp_w: 300,\n"
        "     intra_node_gb_per_s: 100, inter_node_gb_per_s: 10, usd_per_hour: 1.5}\n"
    )
    gpus = load_gpus(path)
    assert find_gpu("z1", gpus).memory_bytes == 64 * 2**30
    assert not find_gpu("z1", gpus).has_tables
    assert "h100_sxm" in gpus


def test_a_bad_file_names_the_field(tmp_path: Path) -> None:
    path = tmp_path / "gpus.yaml"
    path.write_text("gpus:\n  - {name: z1, memory_gb: 64}\n")
    with pytest.raises(LocalFault, match=r"gpus\.yaml.*memory_gib"):
        load_gpus(path)


def test_datasheet_link_is_latency_plus_bytes_over_rate() -> None:
    link = network_link(find_gpu("h100"))
    assert link.transfer_s(0) == 0.0
    one = link.transfer_s(1e9)
    assert one == pytest.approx(2e-5 + 1e9 / (50e9 * 0.8))
    assert link.transfer_s(1e9, num_lanes=4) == pytest.approx(2e-5 + 1e9 / (4 * 50e9 * 0.8))


def run_gpus(*arguments: str) -> str:
    app = typer.Typer()
    app.command()(gpus)
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


def test_gpus_lists_every_type_and_labels_prices_as_assumed() -> None:
    text = run_gpus()
    assert all(name in text for name in catalogue())
    assert "our assumption" in text


def test_gpus_says_what_a_model_needs() -> None:
    record = json.loads(run_gpus("h100", "--model", "Llama-3.1-70B", "--json"))[0]
    assert record["latency_source"] == "measured"
    assert record["model"]["tp"] == 2
    assert 0.02 < record["model"]["decode_16_s"] < 0.05
    assert "no fit" in run_gpus("l4", "--model", "Llama-3.1-405B")


def test_gpus_example_is_a_file_that_it_reads(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(gpus)
    shown = CliRunner().invoke(app, ["--example"])
    assert shown.exit_code == 0
    (tmp_path / "gpus.yaml").write_text(shown.output)
    assert load_gpus(tmp_path / "gpus.yaml")["acme_x1"].usd_per_hour == 2.5
