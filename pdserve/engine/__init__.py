"""Engines: weights, paged KV memory and one `step` over any mix of prefill and decode."""
