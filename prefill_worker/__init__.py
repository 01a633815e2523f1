"""The prefill worker: reads prompts and offers their KV blocks."""
