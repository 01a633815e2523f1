"""Builds one router, on whatever clock and streams it is given."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from pdserve.config.processes import RouterSettings
from pdserve.domain.ids import PROTOCOL_VERSION, Epoch
from pdserve.domain.messages import ClusterState, PeerHello
from pdserve.engine.model_files import resolve_model_dir
from pdserve.engine.tokenizer import Tokenizer
from pdserve.observe.prometheus import RouterNow
from pdserve.observe.watch import RouterWatch
from router.admission import TextLimits
from router.cluster_view import Health, Ledger
from router.decode_links import ConnectDecode
from router.dispatch import Dispatcher, DispatchLimits, Encode
from router.in_flight import InFlight, Outcome
from router.membership import Membership
from router.policy import POLICIES
from router.rate_limit import RateLimit
from router.registrations import Registrations
from router.slo import SloBook

DEFAULT_BURST_S = 10.0
"""Without `max_burst`, what `max_rate` lets in during this time may come at once."""


@dataclass(slots=True, kw_only=True)
class Router:
    """A router at work."""

    settings: RouterSettings
    model_name: str
    clock: Callable[[], float]
    started_s: float
    membership: Membership
    ledger: Ledger
    in_flight: InFlight
    slo: SloBook
    registrations: Registrations
    dispatcher: Dispatcher
    _has_served: bool = field(default=False, init=False)

    def can_serve(self) -> bool:
        """False until a decode worker is at hand: a router that has just come sends nobody away.

        True ever after: with no worker left clients need this router's word for it.
        """
        self._has_served = self._has_served or any(
            worker.health is Health.ALIVE for worker in self.membership.view(self.clock()).decode
        )
        return self._has_served

    def now(self) -> RouterNow:
        view = self.membership.view(self.clock())
        return RouterNow(
            num_in_flight=len(self.in_flight),
            num_waiting=self.ledger.num_unread,
            workers=[
                (worker.hello.role, worker.health) for worker in (*view.prefill, *view.decode)
            ],
            is_draining=self.in_flight.is_draining,
        )

    def state(self, public_address: str = "") -> ClusterState:
        now_s, counts = self.clock(), self.in_flight.counts
        return ClusterState(
            router_id=self.settings.router_id,
            model_name=self.model_name,
            public_address=public_address,
            uptime_s=now_s - self.started_s,
            num_in_flight=len(self.in_flight),
            num_waiting=self.ledger.num_unread,
            **{f"num_{outcome}": counts[outcome] for outcome in Outcome},
            workers=self.membership.worker_states(now_s),
            slo=self.slo.states(),
        )


def build_router(
    settings: RouterSettings,
    *,
    tokenizer: Tokenizer,
    encode: Encode,
    slo: SloBook,
    connect: ConnectDecode,
    clock: Callable[[], float],
    rng: Random,
    watch: RouterWatch,
) -> Router:
    """`connect` reaches decode workers; `tokenizer` says what `encode` may be given."""
    model_dir = resolve_model_dir(settings.model)  # "." has no name of its own
    model_name = settings.model_name or Path(settings.model).name or model_dir.name
    ledger = Ledger()
    in_flight = InFlight(max_num_requests=settings.max_num_requests)
    membership = Membership(timers=settings.timers, ledger=ledger, tokenizer_hash=tokenizer.digest)
    return Router(
        settings=settings,
        model_name=model_name,
        clock=clock,
        started_s=clock(),
        membership=membership,
        ledger=ledger,
        in_flight=in_flight,
        slo=slo,
        registrations=Registrations(
            membership,
            me=PeerHello(
                peer_id=settings.router_id,
                epoch=Epoch(rng.getrandbits(63)),
                protocol_version=PROTOCOL_VERSION,
            ),
            connect=connect,
            timers=settings.timers,
            clock=clock,
            rng=rng,
        ),
        dispatcher=Dispatcher(
            model_name=model_name,
            membership=membership,
            ledger=ledger,
            in_flight=in_flight,
            policy=POLICIES[settings.policy],
            slo=slo,
            watch=watch,
            encode=encode,
            timers=settings.timers,
            limits=DispatchLimits(
                max_num_waiting=settings.max_num_waiting,
                max_wait_s=settings.max_wait_s,
                rate=_rate_limit(settings),
                max_num_attempts=settings.max_num_attempts,
                text=TextLimits(
                    max_prompt_chars=settings.max_prompt_chars,
                    max_chars_per_token=tokenizer.max_chars_per_token(),
                ),
            ),
            clock=clock,
            rng=rng,
        ),
    )


def _rate_limit(settings: RouterSettings) -> RateLimit | None:
    if not settings.max_rate:
        return None
    burst = settings.max_burst or math.ceil(DEFAULT_BURST_S * settings.max_rate)
    return RateLimit(settings.max_rate, burst)
