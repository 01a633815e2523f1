"""`pdserve check-links`: what moves KV between each prefill and decode worker, measured."""
