"""How fast scattered KV blocks move between two processes of one host."""
