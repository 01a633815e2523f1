"""Whether a model can be divided among ranks: found out before any weight is read."""

from dataclasses import replace
from typing import Any

import structlog
import torch
from torch import Tensor

from pdserve.domain.errors import LocalFault
from pdserve.domain.rank_place import RankPlace
from pdserve.engine.library_model import library_config
from pdserve.engine.model_files import ModelFiles
from pdserve.engine.model_probe import plain_logits, probe_tokens
from pdserve.engine.sharding.building import build_empty
from pdserve.engine.sharding.cut_model import cut_model
from pdserve.engine.sharding.cutting import Cutter
from pdserve.engine.sharding.hollow import find_layers, find_shape
from pdserve.engine.sharding.local_config import local_config, unfit
from pdserve.engine.sharding.shares import RankShare, dense_logits
from pdserve.engine.sharding.sources import InMemory
from pdserve.engine.sharding.thread_group import ThreadGroup, run_ranks
from pdserve.engine.sharding.twin import random_twin, twin_config

log = structlog.get_logger(__name__)

_TOLERANCE = 1e-4  # of logits, relative to their deviation; rounding is below 1e-5
_SEEDS = (0, 1)  # of experts that score alike another may be chosen after other rounding
_DEADLINE_S = 60.0


def check_divisible(files: ModelFiles, tp: int, pp: int) -> None:
    """Raise `LocalFault` unless `tp * pp` ranks can serve the model; reads no weights.

    Says what stands in the way, and what can serve the model instead. Takes about a second: a
    small random model of the same kind is divided, and must give the logits that it gives whole.
    """
    if tp * pp == 1:
        return
    config = library_config(files)
    num_layers = config.get_text_config().num_hidden_layers
    if pp > num_layers:
        raise LocalFault(
            f"pp must be at most {num_layers}, the number of layers of {files.name}; got {pp}"
        )
    _check_sizes(config, tp=tp, pp=pp, limit=files.max_context_tokens)
    check_twin(config, tp=tp, pp=pp)


def _check_sizes(config: Any, *, tp: int, pp: int, limit: int) -> None:
    """KV must divide, and every tensor of a shard be a part that a rule explains."""
    whole, shard = (build_empty(each, torch.float32) for each in (config, local_config(config, tp)))
    shapes, parts = _shapes(whole), _shapes(shard)
    shape = find_shape(whole, limit)
    share = RankShare(
        place=RankPlace(tp=tp, pp=pp), whole_layers=shape.layers, length_rule=shape.length_rule
    )
    try:
        divided = share.sharded_layout(block_size=1, dtype="float32")
    except ValueError as error:
        raise unfit(config, tp, str(error), pp=pp) from error
    if tp == 1:
        return
    if find_layers(shard) != replace(divided, pp=1).rank(0).layout.layers:
        reason = "its code takes the hidden size for the width of all heads together"
        raise unfit(config, tp, reason, pp=pp)
    cutter = Cutter(config=config, shard=0, tp=tp)
    for name, part in parts.items():
        cutter.cut(name, shapes[name], part)


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def check_twin(config: Any, *, tp: int, pp: int) -> None:
    """Raise `LocalFault` unless a small model like that of `config` can be divided so."""
    problem = _problem_of_twin(config, tp=tp, pp=pp)
    if problem is None:
        return
    if tp > 1 and pp > 1 and _problem_of_twin(config, tp=tp, pp=1) is None:
        tp = 1  # the stages are what does not work
    raise unfit(config, tp, problem, pp=pp)


def _problem_of_twin(config: Any, *, tp: int, pp: int) -> str | None:
    """What a small model that was divided so does wrong, as a clause."""
    try:
        small = twin_config(config, tp=tp, pp=pp)
        is_same = any(_gives_same_logits(small, seed, tp=tp, pp=pp) for seed in _SEEDS)
    except Exception as error:  # noqa: BLE001 - any model code may run here
        log.warning(
            "model.not_divided",
            model_type=config.model_type,
            error=repr(error),
            cause=repr(error.__cause__),
        )
        return f"a small model of its kind that was divided so fails ({type(error).__name__})"
    if is_same:
        return None
    return "a small model of its kind that was divided so computes other logits than whole"


def _gives_same_logits(config: Any, seed: int, *, tp: int, pp: int) -> bool:
    model = random_twin(config, seed)
    sizes = config.get_text_config()
    tokens = probe_tokens(sizes.vocab_size)
    sources = {name: InMemory(tensor) for name, tensor in model.state_dict().items()}
    expected = plain_logits(model, tokens, len(tokens))

    @torch.inference_mode()
    def of_rank(group: ThreadGroup) -> Tensor | None:
        part = cut_model(
            config,
            build_empty(config, torch.float32),
            sources,
            "float32",
            group,
            limit=sizes.max_position_embeddings,
        )
        logits = dense_logits(part, tokens, len(tokens))
        return logits if group.place.is_last_stage else None

    results = run_ranks(tp, pp, of_rank, _DEADLINE_S)
    limit = _TOLERANCE * float(expected.std())
    return all(
        float((logits - expected).abs().max()) <= limit for logits in results if logits is not None
    )
