"""When the KV of a prompt may travel."""

from typing import Literal

Overlap = Literal["chunks", "none"]
"""How early a prefill worker lets blocks go, beside what is still being computed.

chunks      as soon as the chunk that fills them is computed
none        all of them once the whole prompt is
"""
