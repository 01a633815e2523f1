"""One rank's model, made of the parts of a checkpoint that it holds and of no others."""

from typing import Any

from pdserve.domain.rank_place import RankPlace
from pdserve.engine.library_model import library_config, load_fault
from pdserve.engine.model_faults import check_not_quantised
from pdserve.engine.model_files import ModelFiles
from pdserve.engine.paged_cache import DTYPES
from pdserve.engine.rank_group import RankGroup
from pdserve.engine.sharding.building import build_empty
from pdserve.engine.sharding.check import check_divisible
from pdserve.engine.sharding.checkpoint import read_sources
from pdserve.engine.sharding.cut_model import cut_model


def load_rank_model(
    files: ModelFiles,
    dtype: str,
    place: RankPlace,
    group: RankGroup,
    device: str = "cpu",
) -> Any:
    """The model of the rank at `place`, with its share of the weights on `device`.

    Its forward speaks to the other ranks through `group`. All shards of the last stage give full
    logits; what the others give as logits is to be ignored. `LocalFault` if the files are not fit,
    or if the model cannot be divided so, which rank 0 finds out for all.
    """
    if place != group.place:
        raise ValueError(f"the group is of {group.place}, not of {place}")
    check_not_quantised(files.model_dir, files.config, files.weights)
    if place.rank == 0:
        check_divisible(files, place.tp, place.pp)
    config = library_config(files)
    try:
        whole = build_empty(config, DTYPES[dtype])
        sources = read_sources(files, whole)
    except (ImportError, MemoryError) as error:
        raise load_fault(files, error) from error
    return cut_model(
        config, whole, sources, dtype, group, device=device, limit=files.max_context_tokens
    )
