"""Divides a model of `transformers` among the ranks of a worker."""

from pdserve.engine.sharding.check import check_divisible
from pdserve.engine.sharding.loading import load_rank_model

__all__ = ["check_divisible", "load_rank_model"]
