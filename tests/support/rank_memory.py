"""How much memory each rank of a worker takes to load its model: `python -m ... DIR TP PP`.

Prints one line of JSON for each rank, and ends. Each rank is a fork of this process, and loads a
small model before: what the large one takes is its weights.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pdserve.domain.rank_place import RankPlace
from pdserve.engine.model_files import ModelFiles
from pdserve.engine.sharding import load_rank_model
from pdserve.engine.torch_engine import keep_freed_memory
from pdserve.models import DEMO_MODEL_DIR


@dataclass(slots=True)
class Nobody:
    """A group of which nothing is asked while a model is loaded."""

    place: RankPlace

    def all_reduce(self, tensor: Tensor) -> Tensor:
        raise NotImplementedError

    def all_gather(self, tensor: Tensor) -> Tensor:
        raise NotImplementedError

    def least(self, number: int, device: torch.device) -> int:
        return number

    def send(self, tensor: Tensor) -> None:
        raise NotImplementedError

    def receive(self, tensor: Tensor) -> Tensor:
        raise NotImplementedError

    def close(self) -> None:
        return


def main(model_dir: Path, tp: int, pp: int) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    import transformers  # noqa: F401

    files = ModelFiles.open(model_dir)
    for rank in range(tp * pp):
        child = os.fork()
        if child == 0:
            _measure(files, RankPlace(rank=rank, tp=tp, pp=pp))
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            raise SystemExit(f"rank {rank} failed")


def _measure(files: ModelFiles, place: RankPlace) -> None:
    # Pages of libraries count for a process once it has used them; that is not what is asked.
    load_rank_model(ModelFiles.open(DEMO_MODEL_DIR), "float32", place, Nobody(place))
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _status_bytes("VmRSS")
    model = load_rank_model(files, "float32", place, Nobody(place))
    peak = _status_bytes("VmHWM") - before
    tensors = {id(each): each.numel() * each.element_size() for each in model.parameters()}
    print(json.dumps({"weights": sum(tensors.values()), "peak": peak}), flush=True)


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    [line] = [line for line in lines if line.startswith(f"{field}:")]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
