"""What a watch is told shows in the text that Prometheus reads."""

import pytest

from pdserve.domain.errors import Reason
from pdserve.observe.prometheus import DecodeMetrics, PrefillMetrics


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_failed_rows_are_counted_by_reason(role: str) -> None:
    metrics = (
        PrefillMetrics("w", block_bytes=1, outcomes=())
        if role == "prefill"
        else DecodeMetrics("w", block_bytes=1, transports=())
    )
    metrics.row_failed(Reason.UNUSABLE_LOGITS)
    metrics.row_failed(Reason.UNUSABLE_LOGITS)
    text = metrics.render("")[0].decode()
    assert 'pdserve_engine_row_failures_total{reason="UNUSABLE_LOGITS"} 2.0' in text
    assert 'pdserve_engine_row_failures_total{reason="INTERNAL"} 0.0' in text
