"""The two small models that ship in the package, so that a cluster can be tried offline.

Both are Llama-shaped, share one tokenizer and were made by `scripts/train_demo_model.py`.
"""

from pathlib import Path

__all__ = ["DEMO_DRAFT_MODEL_DIR", "DEMO_MODEL_DIR"]

DEMO_MODEL_DIR: Path = Path(__file__).resolve().parent / "demo"
DEMO_DRAFT_MODEL_DIR: Path = Path(__file__).resolve().parent / "demo_draft"
