"""A profile as `pdserve profile` finds it, with round numbers."""

from pdserve.domain.latency import StepCoefficients
from placement.fitted_profile import FittedProfile, Handoff, Limits, Serving

SERVING_PROFILE = FittedProfile(
    model="demo",
    gpu="laptop",
    prefill=StepCoefficients(
        fixed_s=2e-3,
        prefill_token_s=4e-5,
        prefill_attention_s=4e-8,
        decode_token_s=0.0,
        decode_context_token_s=0.0,
        relative_error=0.05,
    ),
    decode=StepCoefficients(
        fixed_s=2e-3,
        prefill_token_s=0.0,
        prefill_attention_s=0.0,
        decode_token_s=1e-4,
        decode_context_token_s=2e-7,
        relative_error=0.02,
    ),
    handoff=Handoff(handoff_s=0.006, link_latency_s=0.008, link_bytes_per_s=1e9),
    limits=Limits(
        prefill_kv_tokens=8192,
        decode_kv_tokens=16384,
        kv_bytes_per_token=2048.0,
        block_size=16,
        max_step_tokens=512,
        max_num_requests=64,
    ),
    serving=Serving(
        prefill=1.2,
        decode=1.1,
        beside_prefill=1.4,
        beside_answer=0.05,
        beside_decode=1.3,
        stolen_s=0.003,
        wake_s=0.001,
    ),
)
