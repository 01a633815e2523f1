"""When the KV of a prompt may travel."""

from typing import Literal

Overlap = Literal["layers", "chunks", "none"]
"""How early a prefill worker lets blocks go, beside what is still being computed.

layers      as chunks, and of the last chunk the layers that are computed
chunks      as soon as the chunk that fills them is computed
none        all of them once the whole prompt is
"""
