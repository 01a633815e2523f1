"""pdserve: LLM serving on separately sized prefill and decode pools."""

__version__ = "0.1.0"
