"""One rank's model, made of a whole one's tensors wherever they are."""

from typing import Any

import torch

from pdserve.engine.attention import count_layers_from
from pdserve.engine.model_probe import use_paged
from pdserve.engine.paged_cache import DTYPES
from pdserve.engine.rank_group import RankGroup
from pdserve.engine.sharding.building import build_empty
from pdserve.engine.sharding.checkpoint import Sources
from pdserve.engine.sharding.cutting import Cutter
from pdserve.engine.sharding.filling import Filling
from pdserve.engine.sharding.hollow import find_shape
from pdserve.engine.sharding.local_config import local_config
from pdserve.engine.sharding.shares import RankShare, set_share
from pdserve.engine.sharding.stages import keep_stage


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
