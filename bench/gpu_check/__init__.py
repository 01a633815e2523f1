"""`python -m bench.gpu_check`: what only a GPU can show, in one run of less than ten minutes."""
