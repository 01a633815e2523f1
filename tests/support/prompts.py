"""Prompts of real text, many of which share a beginning."""

import sysconfig
from pathlib import Path
from random import Random

from pdserve.engine.tokenizer import Tokenizer
from pdserve.models import DEMO_MODEL_DIR

SOURCES = ("argparse.py", "ast.py", "dis.py", "heapq.py", "json/decoder.py", "textwrap.py")


def demo_prompts(
    count: int, *, seed: int, max_context_tokens: int = 1024, max_new_tokens: int = 24
) -> list[tuple[tuple[int, ...], int]]:
    """`count` (prompt, max_tokens) pairs: every length from 1 token to the context limit.

    A third begins where another one does, so that prefixes are shared.
    """
    rng = Random(seed)
    tokenizer = Tokenizer.load(DEMO_MODEL_DIR)
    library = Path(sysconfig.get_path("stdlib"))
    texts = [tokenizer.encode((library / name).read_text(encoding="utf-8")) for name in SOURCES]
    lengths = [1, 2, 15, 16, 17, 31, 32, 33, max_context_tokens - 1, max_context_tokens // 2]
    pairs = []
    for index in range(count):
        longest = max_context_tokens - 1
        length = lengths[index] if index < len(lengths) else int(longest ** rng.random())
        text = rng.choice(texts)
        start = 0 if rng.random() < 1 / 3 else rng.randrange(len(text) - length)
        max_tokens = min(rng.randint(1, max_new_tokens), max_context_tokens - length)
        pairs.append((text[start : start + length], max_tokens))
    return pairs
