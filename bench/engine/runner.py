"""One contender in its own process: reads a job a line, answers a line. Standard library only."""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence

Prompts = list[list[int]]
Generate = Callable[[Prompts, int], Sequence[Sequence[int]]]


def serve(generate: Generate) -> None:
    """Answer jobs `{"prompts", "num_new_tokens"}` until standard input ends.

    Answers hold wall time, CPU time of this process with all its threads, and the tokens. Libraries
    print what they like: their output goes to standard error.
    """
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    out.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        job = json.loads(line)
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        tokens = [list(each) for each in generate(job["prompts"], job["num_new_tokens"])]
        wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
        out.write(json.dumps({"wall_s": wall_s, "cpu_s": cpu_s, "tokens": tokens}) + "\n")


def model_dir() -> str:
    return sys.argv[1]


def dtype() -> str:
    return sys.argv[2]
