"""A model's body through `torch.compile`: all of its layers as one piece of code.

    ids, positions ──▶ body, compiled ──▶ rows ──▶ head, as it is ──▶ logits
                        │ pdserve::attend in each layer: the step's target answers

The number of rows is all that differs between passes. It is symbolic in the code for two rows and
more, and code of its own serves one row, for which operators have shortcuts. Both are made when a
model is loaded, so that its checks and the recorded steps see what will serve.
"""

import time
import types
from collections.abc import Callable
from typing import Any

import structlog
import torch
from torch import Tensor
from torch.nn import Module, ModuleList

from pdserve.domain.errors import LocalFault
from pdserve.engine.attention import AttentionCall, attending
from pdserve.engine.model_probe import run_probe

INDUCTOR = "inductor"
"""The compiler of `torch.compile` that makes kernels."""
_NUM_ROWS = (7, 11, 1)
"""Of the passes at load: of two rows and more twice, to see that one code serves any number."""
_NUM_CODES = 2
_MAX_REASON_CHARS = 300

log = structlog.get_logger(__name__)


class Codes:
    """Makes code, and counts it. Torch keeps it for good, so it knows nothing of the model."""

    def __init__(self, compiler: str) -> None:
        self.num_made = 0
        self.is_ready = False
        """What is made from then on, a request waits for."""
        self._make = torch._dynamo.lookup_backend(compiler)

    def __call__(self, graph: Any, inputs: list[Any]) -> Any:
        self.num_made += 1
        if self.is_ready:
            log.warning("compile.again", num_codes=self.num_made)
        return self._make(graph, inputs)


class CompiledBody:
    """Stands for the `forward` of a model's body."""

    def __init__(self, forward: Callable[..., Any], codes: Codes) -> None:
        self._run = torch.compile(_apart(forward), fullgraph=True, dynamic=False, backend=codes)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Tensors are those of rows: [1, rows]."""
        own = [_own(each) for each in args]
        return self._run(*own, **{name: _own(value) for name, value in kwargs.items()})


def _own(value: Any) -> Any:
    """A copy: it is marked, and begins where memory does, which is the fastest for kernels."""
    if not isinstance(value, Tensor):
        return value
    copied = value.clone()
    if copied.shape[1] > 1:
        torch._dynamo.mark_dynamic(copied, 1)
    return copied


def _apart(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose code nobody else has: compiled code, and its limit, belong to that."""

    def body(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    code, closure = body.__code__.replace(), body.__closure__
    return types.FunctionType(code, body.__globals__, body.__name__, None, closure)


class _Zeros:
    """Answers attention calls while the code is made."""

    def attend(self, call: AttentionCall) -> Tensor:
        return call.query.new_zeros(call.query.shape[1], call.query.shape[0], call.value.shape[-1])


@torch.inference_mode()
def compile_body(model: Any, compiler: str = INDUCTOR) -> Codes:
    """Have `model`, whose layers call our attention, run compiled; all code is made on return.

    `LocalFault` if it cannot be compiled, or not for any number of rows.
    """
    body = _body(model)
    codes = Codes(compiler)
    body.forward = CompiledBody(body.forward, codes)
    began_s = time.perf_counter()
    try:
        with attending(_Zeros()):
            for num_rows in _NUM_ROWS:
                run_probe(model, torch.zeros(num_rows, dtype=torch.long), torch.arange(num_rows))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers raise many kinds
        raise _refusal(model, _reason(error)) from error
    if codes.num_made != _NUM_CODES:
        raise _refusal(model, f"it takes {codes.num_made} compilations for three passes")
    codes.is_ready = True
    log.info("compile.done", seconds=round(time.perf_counter() - began_s, 1))
    return codes


def _body(model: Any) -> Any:
    """The innermost module that has all layers; the head is outside of it."""
    body = model
    while True:
        parts = [child for child in body.children() if _has_layers(child)]
        if len(parts) != 1 or isinstance(parts[0], ModuleList):
            break
        body = parts[0]
    if body is model:
        raise _refusal(model, "its class does not tell its layers from its head")
    return body


def _has_layers(part: Module) -> bool:
    return any("layer_idx" in vars(module) for module in part.modules())


def _reason(error: Exception) -> str:
    """What the compiler said first, which it may have told in more words since."""
    first: BaseException = error
    while first.__cause__ is not None:
        first = first.__cause__
    words = " ".join(str(first).split())
    return f"{type(first).__name__}: {words}"[:_MAX_REASON_CHARS]


def _refusal(model: Any, reason: str) -> LocalFault:
    return LocalFault(
        f"compile: model type {model.config.model_type} cannot be compiled ({reason}); compiling "
        "needs the package triton and a C++ compiler (g++) where the worker runs: install them, "
        "or set compile to false"
    )
