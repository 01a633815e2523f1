"""Divides a model of `transformers` among the ranks of a worker."""

from pdserve.engine.sharding.loading import load_rank_model

__all__ = ["load_rank_model"]
