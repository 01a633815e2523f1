"""Where the reference cases lie."""

from pathlib import Path

REFERENCE = Path(__file__).parent
