"""What a rank is made of, and what other rooms add to it."""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pdserve.config.processes import EngineSettings, WorkerSettings
from pdserve.domain.rank_place import RankPlace
from pdserve.engine.contract import Engine, StepLimits
from pdserve.engine.model_files import ModelFiles
from pdserve.engine.ranks.channel import Handler, RankChannel

if TYPE_CHECKING:  # it names tensors, and timed engines do without torch
    from pdserve.engine.rank_group import RankGroup

LoadPart = Callable[[ModelFiles, EngineSettings, StepLimits, "RankGroup"], Engine]
"""Loads a rank's part of a model, with room for steps of these limits: an `Engine` whose steps only
make sense beside those of all other ranks: only the rank that `draws` has tokens in its results.
`spec` is of the whole model, with its `tp` and `pp`; `kv` is the rank's own. Raises `LocalFault` if
the model cannot be served so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankParts:
    """What a service of a rank other than 0 is built from."""

    settings: WorkerSettings
    place: RankPlace
    engine: Engine  # the rank's part; its `kv` is the rank's own memory
    channel: RankChannel  # to rank 0


OpenRankService = Callable[
    [RankParts], contextlib.AbstractAsyncContextManager[Mapping[str, Handler]]
]
"""Yields the handlers, by name, that it adds to the channel of a rank. It runs on the event loop of
the rank, from when the model is loaded until the worker ends in order."""
