"""Steps of a model on a device: the host submits all of a step, then waits once, for its tokens.

In between it can submit the next one, whose rows follow draws that nobody has seen yet:

    host     submit n+1 | tokens of n: text, stops, sending | submit n+2 | tokens of n+1 ...
    device   -- step n --|----------- step n+1 --------------|------------ step n+2 -------
"""

from collections.abc import Sequence

import numpy as np
import structlog
import torch
from torch import Tensor

from pdserve.domain.engine_spec import StepPath
from pdserve.domain.invariants import check_invariant
from pdserve.engine.contract import Drawn, SampleStep, StepBatch
from pdserve.engine.device.decode_graphs import DecodeGraphs, StepLogits
from pdserve.engine.device.device_attention import DeviceAttention
from pdserve.engine.device.device_backend import DeviceBackend
from pdserve.engine.device.device_draws import UNUSABLE, DrawPlan, draw, greedy_tokens
from pdserve.engine.device.staging import Fetched, Fetcher
from pdserve.engine.paged_model import PagedModel
from pdserve.engine.sampling import draw_tokens, token_or_failure

log = structlog.get_logger(__name__)


class DeviceStepper:
    """Satisfies `Stepper`. Owns the model, its backend and the graphs."""

    def __init__(
        self,
        model: PagedModel,
        backend: DeviceBackend,
        *,
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
        draws: bool = True,
    ) -> None:
        """Launches every step operator by operator until `record` is called."""
        self._draws = draws
        self._model, self._backend = model, backend
        self._runtime, self._stream = backend.runtime, backend.runtime.stream()
        self._vocab_size, self._eos_token_ids = vocab_size, eos_token_ids
        self._graphs: DecodeGraphs | None = None
        self._fetcher = Fetcher(backend.runtime)

    def record(self, sizes: Sequence[int], width: int) -> bool:
        """Record decode steps of these batch sizes, with tables of at most `width` blocks.

        False, and steps stay as they are, where they cannot be recorded: if what the model computes
        depends on the lengths of requests, if its code needs a value on the host, or if attention
        goes request by request.
        """
        attention = self._model.attention
        if self._model.length_rule.switches or not isinstance(attention, DeviceAttention):
            return False
        try:
            with self._runtime.on(self._stream):
                self._graphs = DecodeGraphs(
                    self._model,
                    attention,
                    self._runtime,
                    self._backend.stager,
                    sizes=sizes,
                    width=width,
                    draws=self._draws,
                )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # devices have no kinds of it for what cannot be recorded
            log.warning("decode.not_recorded", device=str(self._runtime.device), exc_info=error)
            return False
        return True

    def forget(self) -> None:
        """Drop what was recorded, before the model gets other KV memory."""
        if self._graphs:
            self._graphs.close()
        self._graphs = None

    @property
    def looks_ahead(self) -> bool:
        """Of several ranks only one knows the draws; past a switch a request is computed anew."""
        model = self._model
        has_feed = isinstance(model.attention, DeviceAttention)
        return model.is_whole and has_feed and not model.length_rule.switches

    def run(self, batch: StepBatch) -> tuple[list[Drawn], StepPath]:
        """KV and tokens are there when it returns."""
        return self.submit(batch).wait()

    @torch.inference_mode()
    def submit(self, batch: StepBatch) -> "SubmittedStep":
        """Another step may be under way, and be waited for later."""
        is_kept = all((each.follows or 0) < self._backend.feed.capacity for each in batch.sequences)
        check_invariant(is_kept, "a draw that is followed is kept", self._backend.feed.capacity)
        steps = [each.sample for each in batch.sequences if each.sample is not None]
        draws = DrawPlan.of(steps, self._vocab_size)
        with self._runtime.on(self._stream):
            size = self._graphs.size_for(batch) if self._graphs else None
            if self._graphs and size:
                path, found = StepPath.GRAPH, self._graphs.run(batch, draws, size)
            else:
                path, found = StepPath.EAGER, self._forward(batch, draws)
            fetched: Fetched
            if found.greedy is None:
                fetched = self._fetcher.fetch()
            else:
                tokens = draw(found.logits, found.greedy, found.plain, found.cut)
                self._backend.feed.keep(tokens)
                rows = [found.logits[row].float() for row in draws.host_rows]
                fetched = self._fetcher.fetch(tokens, *rows)
        return SubmittedStep(fetched, path, steps, draws.host_rows, self._eos_token_ids)

    def _forward(self, batch: StepBatch, draws: DrawPlan) -> StepLogits:
        """Draws are sent first: behind the forward their copy would keep a buffer for its time."""
        plain, cut = self._send_draws(draws)
        logits = self._model.forward(batch)
        greedy = greedy_tokens(logits) if self._draws else None
        return StepLogits(logits=logits, greedy=greedy, plain=plain, cut=cut)

    def _send_draws(self, draws: DrawPlan) -> tuple[Tensor, Tensor]:
        middle, size = draws.plain.size, draws.plain.size + draws.cut.size
        values = self._runtime.empty(size, dtype=torch.int64)
        if size:
            taken = self._backend.stager.take(size * values.element_size()).view(np.int64)
            taken[:middle], taken[middle:] = draws.plain.ravel(), draws.cut.ravel()
            self._backend.stager.send(size * values.element_size(), values.view(torch.uint8))
        return values[:middle].view(draws.plain.shape), values[middle:].view(draws.cut.shape)

    def close(self) -> None:
        self.forget()
        self._runtime.synchronize()
        self._fetcher.close()
        self._model.close()
        self._backend.close()


class SubmittedStep:
    """A step that the device has been given all of. Satisfies `Submitted`."""

    def __init__(
        self,
        fetched: Fetched,
        path: StepPath,
        steps: list[SampleStep],
        host_rows: tuple[int, ...],
        eos_token_ids: tuple[int, ...],
    ) -> None:
        """Without a tensor in `fetched` nothing is drawn."""
        self._fetched, self._path = fetched, path
        self._steps, self._host_rows = steps, host_rows
        self._eos_token_ids = eos_token_ids

    @torch.inference_mode()
    def wait(self) -> tuple[list[Drawn], StepPath]:
        """What the device drew, and what the host draws for its rows."""
        token_ids, *host_logits = self._fetched.wait() or (None,)
        if token_ids is None:
            return [], self._path
        drawn: list[Drawn] = [
            token_or_failure(None if token_id == UNUSABLE else token_id, step)
            for token_id, step in zip(token_ids.tolist(), self._steps, strict=True)
        ]
        if self._host_rows:
            logits = torch.stack(host_logits).numpy()
            steps = [self._steps[row] for row in self._host_rows]
            own = draw_tokens(logits, steps, self._eos_token_ids)
            for row, each in zip(self._host_rows, own, strict=True):
                drawn[row] = each
        return drawn, self._path
