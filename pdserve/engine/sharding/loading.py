"""One rank's model, made of the parts of a checkpoint that it holds and of no others."""

from typing import Any

import torch

from pdserve.domain.rank_place import RankPlace
from pdserve.engine.attention import count_layers_from
from pdserve.engine.library_model import library_config, load_fault
from pdserve.engine.model_faults import check_not_quantised
from pdserve.engine.model_files import ModelFiles
from pdserve.engine.model_probe import use_paged
from pdserve.engine.paged_cache import DTYPES
from pdserve.engine.rank_group import RankGroup
from pdserve.engine.sharding.building import build_empty
from pdserve.engine.sharding.checkpoint import Sources, read_sources
from pdserve.engine.sharding.cutting import Cutter
from pdserve.engine.sharding.filling import Filling
from pdserve.engine.sharding.hollow import find_shape
from pdserve.engine.sharding.local_config import local_config
from pdserve.engine.sharding.shares import RankShare, set_share
from pdserve.engine.sharding.stages import keep_stage


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
    or if the model cannot be divided so.
    """
    check_not_quantised(files.model_dir, files.config, files.weights)
    config = library_config(files)
    try:
        whole = build_empty(config, DTYPES[dtype])
        sources = read_sources(files, whole)
    except (ImportError, MemoryError) as error:
        raise load_fault(files, error) from error
    return cut_model(
        config, whole, sources, dtype, group, device=device, limit=files.max_context_tokens
    )


def cut_model(
    config: Any,
    whole: Any,
    sources: Sources,
    dtype: str,
    group: RankGroup,
    *,
    limit: int,
    device: str = "cpu",
) -> Any:
    """The model of the rank of `group`, filled from `sources`.

    `whole` is the model of `config` without weights; it is used up. Requests have at most `limit`
    tokens.
    """
    place = group.place
    shapes = {name: tuple(tensor.shape) for name, tensor in whole.state_dict().items()}
    shape = find_shape(whole, limit)
    share = RankShare(place=place, whole_layers=shape.layers, length_rule=shape.length_rule)
    model = build_empty(local_config(config, place.tp), DTYPES[dtype])
    keep_stage(model, share.layers, group, shape.layers_give_tuples)
    cutter = Cutter(config=config, shard=place.shard, tp=place.tp)
    Filling(
        model=model,
        cutter=cutter,
        shapes=shapes,
        sources=sources,
        group=group,
        device=torch.device(device),
    ).run(DTYPES[dtype])
    use_paged(model)
    count_layers_from(model, share.layers.start)
    set_share(model, share)
    return model
