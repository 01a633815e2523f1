"""What `pdserve profile` shows: coefficients, residuals, and how sure they are."""

from rich.console import Console
from rich.table import Table

from pdserve.cli.tables import titled_table
from placement.fitted_profile import FittedProfile
from placement.fitting import Phase, error_summary

HEAVY_FOREIGN_CORES = 0.3
PHASES: tuple[Phase, ...] = ("prefill", "decode")


def show_profile(profile: FittedProfile, console: Console) -> None:
    """Tables: the points, then the errors, then the coefficients."""
    console.print(_point_table(profile))
    console.print(_error_table(profile))
    console.print(_coefficient_table(profile))
    handoff, limits = profile.handoff, profile.limits
    console.print(
        f"handoff: {handoff.handoff_s * 1e3:.2f} ms in TTFT; KV arrives "
        f"{handoff.link_latency_s * 1e3:.2f} ms after the prompt's last step, "
        f"and {_link_speed(handoff.link_bytes_per_s)}"
    )
    found = profile.serving
    console.print(
        f"among requests of all lengths: a prefill step takes {found.prefill:.2f} times as long as "
        f"in a row of like ones, a decode step {found.decode:.2f} times; beside the other role's "
        f"{found.beside_prefill:.2f} and {found.beside_decode:.2f} times that; a new request takes "
        f"{found.stolen_s * 1e3:.1f} ms from those that are decoded"
    )
    console.print(
        f"limits: {limits.max_step_tokens} prompt tokens in a step, {limits.max_num_requests} "
        f"answers at once, KV for {limits.decode_kv_tokens:,} tokens in a decode worker"
    )
    for role, ranks in (("prefill", profile.prefill_ranks), ("decode", profile.decode_ranks)):
        if ranks.tp * ranks.pp > 1:
            console.print(f"{role} workers: {ranks}; their steps include what the ranks exchange")
    if profile.foreign_cores is not None:
        console.print(f"other programs kept {profile.foreign_cores:.1f} cores busy meanwhile")
        if profile.foreign_cores > HEAVY_FOREIGN_CORES:
            console.print("warning: that dilates times; profile again on a quiet machine")


def _point_table(profile: FittedProfile) -> Table:
    columns = ("phase", "point", "measured", "fitted", "error", "at start", "error")
    table = titled_table("residuals", *columns, num_left=2)
    for each in profile.residuals:
        cells = (
            _ms(each.measured_s),
            _ms(each.predicted_s),
            f"{each.error:+.1%}",
            _ms(each.reported_s),
            f"{each.reported_error:+.1%}",
        )
        table.add_row(each.phase, each.label, *cells)
    return table


def _error_table(profile: FittedProfile) -> Table:
    columns = ("points", "fitted p50", "fitted p90", "at start p50", "at start p90")
    table = titled_table("absolute errors", "", *columns)
    for group in (*PHASES, "all"):
        chosen = [each for each in profile.residuals if group in (each.phase, "all")]
        if not chosen:
            continue
        fitted = error_summary([each.error for each in chosen])
        reported = error_summary([each.reported_error for each in chosen])
        cells = [f"{value:.1%}" for value in (*fitted, *reported)]
        table.add_row(group, str(len(chosen)), *cells)
    return table


def _coefficient_table(profile: FittedProfile) -> Table:
    table = titled_table("coefficients", "microseconds for each", *PHASES)
    rows = {
        "step": "fixed_s",
        "prompt token": "prefill_token_s",
        "attended pair of a prompt": "prefill_attention_s",
        "answer in the batch": "decode_token_s",
        "context token": "decode_context_token_s",
    }
    for label, field in rows.items():
        values = [getattr(profile.coefficients(phase), field) for phase in PHASES]
        table.add_row(label, *(f"{value * 1e6:,.4g}" if value else "-" for value in values))
    return table


def _link_speed(bytes_per_s: float) -> str:
    return (
        "sooner than could be measured" if bytes_per_s > 1e12 else f"{bytes_per_s / 1e6:,.0f} MB/s"
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f} ms"
