"""The commands of clients: their options and help. What they do is in the modules they import."""

from collections.abc import Callable, Coroutine
from typing import Annotated, Any

import typer

from pdserve.cli.options import (
    INTERNAL_ADDRESS_NAMES,
    AsJson,
    InternalAddress,
    JsonFile,
    ModelName,
    PublicAddress,
    SloClassName,
    address_given,
    text_given,
)

DEFAULT_ADDRESS = "127.0.0.1:7450"
DEFAULT_INTERNAL_ADDRESS = "127.0.0.1:7451"


def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from standard input.")],
    address: PublicAddress = DEFAULT_ADDRESS,
    model: ModelName = "",
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", "-n", min=1, help="Output tokens at most [16].")
    ] = None,
    min_tokens: Annotated[
        int | None, typer.Option(min=0, help="Output tokens before the answer may stop.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", "-t", help="0 (greedy) to 2 [0].")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=0, help="Draw from the k likeliest tokens; 0 is all [0].")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the likeliest tokens of this mass [1].")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="The same seed draws the same answer.")
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            callback=text_given, help="End before this text, or special token; may be repeated."
        ),
    ] = None,
    stop_token_id: Annotated[
        list[int] | None, typer.Option(min=0, help="End at this token; may be repeated.")
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on past the model's own end.")
    ] = False,
    include_stop_str_in_output: Annotated[
        bool,
        typer.Option("--include-stop-str-in-output", help="Show what ended the answer too."),
    ] = False,
    skip_special_tokens: Annotated[
        bool, typer.Option(help="Leave special tokens out of the answer's text.")
    ] = True,
    add_special_tokens: Annotated[
        bool, typer.Option(help="Put the model's begin token before a prompt that has none.")
    ] = True,
    logprobs: Annotated[
        int | None, typer.Option(min=0, help="Show each token's log-probability and N others.")
    ] = None,
    slo_class: SloClassName = "",
    timeout: Annotated[
        float | None, typer.Option(min=0.001, help="Give up after this many seconds.")
    ] = None,
    token_ids: Annotated[
        bool, typer.Option("--token-ids", help="Prompt and answer are token ids, not text.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Stream one answer, then show where its time went.

    \b
    Examples:
      pdserve generate "def read_lines(path):" --max-tokens 40
      pdserve generate - < prompt.txt
      pdserve generate "import os" -t 0.8 --top-p 0.95 --seed 7
      pdserve generate "5 17 99" --token-ids --json
    """
    from pdserve.cli.generating import Question, answer
    from pdserve.client.values import Sampling

    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        stop=tuple(stop or ()),
        stop_token_ids=tuple(stop_token_id or ()),
        ignore_eos=ignore_eos,
        logprobs=logprobs,
        skip_special_tokens=skip_special_tokens,
        include_stop_str_in_output=include_stop_str_in_output,
    )
    question = Question(
        prompt=prompt,
        sampling=sampling,
        model=model,
        slo_class=slo_class,
        timeout_s=timeout,
        is_token_ids=token_ids,
        add_special_tokens=add_special_tokens,
        as_json=as_json,
    )
    _run(lambda: answer(address, question))


def status(
    internal_address: InternalAddress = DEFAULT_INTERNAL_ADDRESS,
    # As it was called once, by scripts; it means the same.
    address: Annotated[
        str | None, typer.Option("--address", "-a", hidden=True, callback=address_given)
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Again every second.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show workers, load, KV blocks and request counts.

    \b
    Examples:
      pdserve status
      pdserve status --watch
      pdserve status --json | jq '.workers[].load.kv'
    """
    from pdserve.cli.status_view import show_status

    _run(lambda: show_status(address or internal_address, watch=watch, as_json=as_json))


def models(address: PublicAddress = DEFAULT_ADDRESS, as_json: AsJson = False) -> None:
    """List the models served and their limits.

    \b
    Example:
      pdserve models
    """
    from pdserve.cli.status_view import show_models

    _run(lambda: show_models(address, as_json=as_json))


def bench(
    address: PublicAddress = DEFAULT_ADDRESS,
    model: ModelName = "",
    rate: Annotated[
        float | None,
        typer.Option(min=0.001, help="Requests/s of a Poisson process [2, without --trace]."),
    ] = None,
    trace: Annotated[
        str | None,
        typer.Option(
            help="azure-code, azure-conv, or a file: its requests; at a --rate drawn at random."
        ),
    ] = None,
    time_scale: Annotated[
        float, typer.Option(min=0.0, help="Multiply the trace's times: 0.5 is twice as fast.")
    ] = 1.0,
    requests: Annotated[int, typer.Option("--requests", min=1, help="How many requests.")] = 60,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, help="Prompt length, without --trace.")
    ] = 128,
    output_tokens: Annotated[int, typer.Option(min=1, help="Output length, without --trace.")] = 32,
    slo_ttft: Annotated[
        float | None, typer.Option(min=0.0, help="Objective: seconds to the first token.")
    ] = None,
    slo_tpot: Annotated[
        float | None, typer.Option(min=0.0, help="Objective: mean seconds between tokens.")
    ] = None,
    slo_class: SloClassName = "",
    timeout: Annotated[
        float, typer.Option(min=0.001, help="A request fails after this many seconds.")
    ] = 120.0,
    seed: Annotated[int, typer.Option(min=0, help="Of arrivals and prompts.")] = 0,
    json_file: JsonFile = None,
    as_json: AsJson = False,
) -> None:
    """Measure latency and goodput under load.

    Requests leave at their planned times, whatever became of earlier ones. Prompts are random
    tokens; lengths that the model's context cannot hold are scaled down to fit.

    \b
    Examples:
      pdserve bench --rate 4 --requests 100 --slo-ttft 0.5 --slo-tpot 0.05
      pdserve bench --trace azure-code --time-scale 0.2
      pdserve bench --trace mine.csv --json-file result.json
    """
    from pdserve.cli.benching import Plan, run_bench
    from pdserve.client.statistics import Slo

    plan = Plan(
        model=model,
        rate=rate,
        trace=trace,
        time_scale=time_scale,
        num_requests=requests,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        slo=Slo(ttft_s=slo_ttft, tpot_s=slo_tpot),
        slo_class=slo_class,
        timeout_s=timeout,
        seed=seed,
    )
    _run(lambda: run_bench(address, plan, json_file, as_json=as_json))


def smoke(
    address: PublicAddress = DEFAULT_ADDRESS,
    internal_address: Annotated[
        str | None,
        typer.Option(
            *INTERNAL_ADDRESS_NAMES,
            envvar="PDSERVE_INTERNAL_ADDRESS",
            callback=address_given,
            help="The router's internal host:port; given, the workers' KV books are checked too.",
        ),
    ] = None,
    model: ModelName = "",
    timeout: Annotated[
        float, typer.Option(min=0.1, help="A check fails after this many seconds.")
    ] = 60.0,
    as_json: AsJson = False,
) -> None:
    """Check from outside that a cluster serves as it should; exits 0 if it does, 1 if not.

    Asks for short and long answers, alone and side by side, twice with one seed, for what cannot
    be, and goes away in the middle of one.

    \b
    Examples:
      pdserve smoke
      pdserve smoke --address 10.0.0.7:7450 --internal-address 10.0.0.7:7451
    """
    from pdserve.cli.smoking import run_smoke

    _run(
        lambda: run_smoke(
            address, internal_address, model=model, timeout_s=timeout, as_json=as_json
        )
    )


COMMANDS: dict[str, Callable[..., None]] = {
    "generate": generate,
    "status": status,
    "models": models,
    "smoke": smoke,
    "bench": bench,
}


def _run(start: Callable[[], Coroutine[Any, Any, int | None]]) -> None:
    from pdserve.cli.running import run

    run(start)
