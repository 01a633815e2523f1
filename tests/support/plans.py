"""A small plan file for the CPU, as data."""

from typing import Any

STEP_TIMES = {
    "fixed_s": 0.001,
    "prefill_token_s": 1e-5,
    "decode_token_s": 1e-4,
    "decode_context_token_s": 1e-7,
}


def plan(**changes: object) -> dict[str, Any]:
    """Two prefill workers, three decode workers, on the CPU."""
    return {
        "version": 1,
        "model": "demo",
        "rules": "pdserve",
        "block_size": 8,
        "pools": [
            pool("prefill", 2, kv_tokens=4000, step_times={**STEP_TIMES, "fixed_s": 0.002}),
            pool("decode", 3, kv_tokens=8000, step_times=STEP_TIMES),
        ],
        "slo": [
            {"name": "chat", "ttft_s": 0.2, "tpot_s": 0.05, "attainment": 0.9, "share": 0.7},
            {"name": "batch", "ttft_s": 2.0, "tpot_s": 0.1, "attainment": 0.8, "share": 0.3},
        ],
        "limits": {
            "max_step_tokens": 256,
            "max_num_requests": 12,
            "max_num_waiting": 40,
            "max_wait_s": 2.0,
            "max_rate": 20.0,
            "max_burst": 70,
        },
        "prediction": {
            "rate": 20.0,
            "goodput": 19.0,
            "goodput_per_gpu": 3.8,
            "attainment": 0.95,
            "attainment_interval": [0.93, 0.97],
            "usd_per_hour": 0.0,
            "usd_per_million_tokens": 0.0,
            "watts": 0.0,
            "horizon_s": 600.0,
            "num_seeds": 5,
            "step_time_error": 0.05,
        },
        **changes,
    }


def pool(role: str, replicas: int, **changes: object) -> dict[str, Any]:
    return {"role": role, "gpu": "profiled", "tp": 1, "replicas": replicas, **changes}
