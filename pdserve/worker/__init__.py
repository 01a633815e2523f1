"""What prefill and decode workers have in common: what they are built from, and their process."""
