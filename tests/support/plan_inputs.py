"""Small planning questions that are answered in well under a second."""

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
