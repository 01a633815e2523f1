"""Where the ranks of a worker find each other for tensors; needs torch."""

import torch

from pdserve.config.processes import EngineSettings
from pdserve.domain.rank_place import RankPlace
from pdserve.engine.ranks.torch_group import TorchGroup, reach_store


def meet(
    place: RankPlace,
    settings: EngineSettings,
    *,
    host: str,
    store_host: str,
    store_port: int,
    deadline_s: float,
) -> TorchGroup:
    """Blocks until all ranks have come; `RankLost` if that takes longer than `deadline_s`."""
    torch.set_num_threads(1)
    device = torch.device(settings.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = reach_store(store_host, store_port, place.num_ranks, deadline_s)
    return TorchGroup(place, store, host=host, device=device, deadline_s=deadline_s)
