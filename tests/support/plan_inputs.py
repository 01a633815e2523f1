"""Small planning questions that are answered in seconds."""

from typing import Any

from placement.plan_inputs import PlanInputs, parse_inputs


def small_inputs(**changes: Any) -> PlanInputs:
    """OPT-13B under DistServe's profile on one node of 4 A100s; short traces, two seeds."""
    search = {"duration_s": 60, "seeds": 2, "what_ifs": False, **changes.pop("search", {})}
    data: dict[str, Any] = {
        "model": "facebook/opt-13b",
        "rules": "distserve",
        "latency": {"profile": "profiler-a100-80g.distserve.json"},
        "cluster": {"nodes": [{"gpu": "a100_sxm", "nodes": 1, "gpus_per_node": 4}]},
        "workload": {
            "prompt_tokens": {"mean": 500, "cv": 0.6, "max": 1800},
            "output_tokens": {"mean": 120, "cv": 0.6, "max": 600},
        },
        "slo": {"ttft_s": 0.25, "tpot_s": 0.08},
        "search": search,
    }
    return parse_inputs({**data, **changes}, source="small")


def two_type_inputs(**cluster: Any) -> PlanInputs:
    """OPT-13B, whose KV is heavy, on 2 nodes of A100s and 2 of H100s, under our own rules."""
    nodes = [{"gpu": gpu, "nodes": 2, "gpus_per_node": 8} for gpu in ("a100_sxm", "h100_sxm")]
    data = {
        "model": "facebook/opt-13b",
        "cluster": {"nodes": nodes, **cluster},
        "workload": {
            "prompt_tokens": {"mean": 500, "cv": 0.6, "max": 1500},
            "output_tokens": {"mean": 120, "cv": 0.6, "max": 500},
        },
        "slo": {"ttft_s": 0.4, "tpot_s": 0.08},
        "objective": {"goal": "goodput"},
        "search": {"duration_s": 10, "seeds": 1, "what_ifs": False},
    }
    return parse_inputs(data, source="two types")
