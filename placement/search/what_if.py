"""The plan under changed circumstances: losses, bursts, other lengths and rates, closed loops."""

import math
from dataclasses import replace
from typing import Any

import numpy as np

from placement.search.designs import Design, Worker, gpus_text
from placement.search.evaluate import Evaluator
from placement.search.predict import met_promises, predict
from placement.search.problem import Problem, bounds_of
from placement.search.results import Curve, Prediction, WhatIf
from placement.simulate import Simulator
from placement.simulation.summary import Verdict, attainment_interval
from placement.simulation.values import PoolRole, Rules

SEEDS = 2
MAX_REQUESTS = 9000
BURST_CV = 2.0
HEAVY_CV = 1.0
RATE_FACTORS = (0.5, 0.8, 0.9, 1.1, 1.2)
MAX_ADVICE = 6
LEAST_GAIN = 0.005  # a worker that adds less to the margin than this: more of them will not do


class Questions:
    """Asks what-ifs of one design at one rate; fewer seeds than the certificate."""

    def __init__(
        self,
        problem: Problem,
        evaluator: Evaluator,
        design: Design,
        rate: float,
        nodes: tuple[dict[str, Any], ...] = (),
    ) -> None:
        self.problem = problem
        self.evaluator = evaluator
        self.design = design
        self.rate = rate
        self.nodes = nodes
        self.seeds = SEEDS if problem.num_cells == 1 else 1
        self.max_requests = MAX_REQUESTS
        if problem.inputs.rules is Rules.PDSERVE:
            self.max_requests = MAX_REQUESTS if problem.num_cells == 1 else MAX_REQUESTS // 2
        self.max_advice = MAX_ADVICE if problem.num_cells == 1 else MAX_ADVICE // 2

    def losses(self) -> list[WhatIf]:
        """After any one worker is gone, and after any one node."""
        found = [
            self._ask(f"1 {worker.label} lost", self.design.with_change(worker, -1))
            for worker, _ in self.design.counts
        ]
        node = self.node_loss()
        if node is not None and node != self.design:
            found.append(self._ask("1 node lost (the worst)", node))
        return found

    def node_loss(self) -> Design | None:
        """What is left after the node whose loss takes the most of one pool."""
        if sum(fleet.nodes for fleet in self.problem.fleets) < 2:
            return None
        by_label = {worker.label: worker for worker, _ in self.design.counts}
        worst: tuple[float, Design] | None = None
        for node in self.nodes:
            left = self.design
            share = 0.0
            for name, count in node["workers"].items():
                worker = by_label[name.split(" stage ")[0]]
                held = dict(left.counts).get(worker, 0)
                lost = min(count, held)
                left = left.with_change(worker, -lost)
                share = max(share, lost / dict(self.design.counts)[worker])
            if worst is None or share > worst[0]:
                worst = (share, left)
        return None if worst is None else worst[1]

    def traffic_changes(self) -> list[WhatIf]:
        """Bursts; prompts of more spread."""
        traffic = self.problem.traffic
        changes = [(f"bursts: arrival CV {BURST_CV:g}", traffic.changed(cv=BURST_CV))]
        lengths = self.problem.inputs.workload.prompt_tokens
        if lengths is not None and (lengths.distribution == "fixed" or lengths.cv < HEAVY_CV):
            heavy = traffic.changed(prompt_cv=HEAVY_CV)
            changes.append((f"prompt length CV {HEAVY_CV:g}", heavy))
        return [
            self._ask(name, self.design, self.evaluator.with_traffic(changed))
            for name, changed in changes
        ]

    def sensitivity(self) -> list[WhatIf]:
        """Rates from half to a fifth more, prompts 20 % longer."""
        found = [self._ask(f"rate x {f:g}", self.design, rate=self.rate * f) for f in RATE_FACTORS]
        longer = self.evaluator.with_traffic(self.problem.traffic.changed(length_scale=1.2))
        found.append(self._ask("prompts 20 % longer", self.design, longer))
        return found

    def closed_loop(self, prediction: Prediction) -> WhatIf | None:
        """The same load as a fixed number of requests under way (Little's law)."""
        if self.problem.inputs.rules is not Rules.PDSERVE or prediction.percentiles is None:
            return None
        stay_s = prediction.percentiles["e2e_s"]["p50"]
        concurrency = max(round(self.rate * stay_s), 1)
        config = replace(self.evaluator.config(self.design), concurrency=concurrency)
        trace, classes = self.problem.traffic.trace(0, self.rate, self._horizon_s(self.rate))
        closed = replace(trace, arrival_s=np.zeros(len(trace)))
        times = Simulator(config).run(closed, ttft_s=config.promises_s[classes])
        margin = self.evaluator.judge(times, closed, classes)
        span_s = max(float((times.arrival_s + times.e2e_s).max()), 1e-9)
        return WhatIf(
            name=f"closed loop of {concurrency} requests",
            rate=len(trace) / span_s,
            attainment=margin.attainment,
            interval=attainment_interval(met_promises(self.problem.slo, times, classes)),
            is_kept=margin.all >= 0,
            verdict=str(Verdict.CLOSED_LOOP),
            ttft_p90_s=float(np.percentile(times.ttft_s, 90)),
            tpot_p90_s=float(np.percentile(times.tpot_s, 90)),
        )

    def curve(self) -> Curve:
        """Attainment against rate."""
        points = []
        for factor in (0.5, 0.7, 0.85, 1.0, 1.1, 1.25):
            rate = self.rate * factor
            margin = self.evaluator.margin(self.design, rate, 0, self._horizon_s(rate))
            points.append((rate, margin.attainment))
        return Curve(name="attainment", x="requests/s", y="attainment", points=tuple(points))

    def _horizon_s(self, rate: float) -> float:
        return min(self.evaluator.horizon_s, max(self.max_requests / rate, 60.0))

    def _ask(
        self,
        name: str,
        design: Design,
        evaluator: Evaluator | None = None,
        rate: float | None = None,
    ) -> WhatIf:
        evaluator, rate = evaluator or self.evaluator, rate or self.rate
        seeds = min(self.seeds, evaluator.num_seeds)
        found = predict(evaluator, design, rate, num_seeds=seeds, horizon_s=self._horizon_s(rate))
        advice = "" if found.is_kept else self._advice(evaluator, design, rate)
        percentiles = found.percentiles
        return WhatIf(
            name=name,
            rate=rate,
            attainment=found.attainment,
            interval=found.interval,
            is_kept=found.is_kept,
            verdict=found.verdict,
            ttft_p90_s=percentiles["ttft_s"]["p90"] if percentiles else None,
            tpot_p90_s=percentiles["tpot_s"]["p90"] if percentiles else None,
            advice=advice,
        )

    def _advice(self, evaluator: Evaluator, design: Design, rate: float) -> str:
        """Fewest workers more that keep the promises there, or why no number of them does."""
        floor = self._floor(evaluator, design)
        if floor:
            return floor
        horizon_s = self._horizon_s(rate)
        added, last = design, -math.inf
        for _ in range(self.max_advice):
            added, reached = self._best_addition(evaluator, added, rate, horizon_s)
            if reached >= 0:
                return f"add {_difference(design, added)}"
            if self.problem.num_cells > 1 and reached < last + LEAST_GAIN and added.is_complete:
                break
            last = reached
        is_plain = evaluator is self.evaluator and rate <= self.rate
        if is_plain and design.num_gpus < self.design.num_gpus:
            return f"add what was lost: {_difference(design, self.design)}"
        return self._lower_rate(evaluator, design, rate, horizon_s)

    def _best_addition(
        self, evaluator: Evaluator, design: Design, rate: float, horizon_s: float
    ) -> tuple[Design, float]:
        """One worker more of the plan's kinds: the smallest that does, else what helps most.

        A pool that is empty comes first. Of each role only the plan's largest pool is tried.
        """
        empty = [worker for worker, _ in self.design.counts if worker not in dict(design.counts)]
        largest: dict[PoolRole, tuple[int, Worker]] = {}
        for worker, count in self.design.counts:
            if worker.role not in largest or count > largest[worker.role][0]:
                largest[worker.role] = (count, worker)
        kinds = sorted((w for _, w in largest.values()), key=lambda w: (w.num_gpus, w.key))
        best: tuple[Design, float] | None = None
        for worker in empty[:1] or kinds:
            other = design.with_change(worker, 1)
            margin = evaluator.margin(other, rate, 0, horizon_s)
            if margin.all >= 0:
                return other, margin.all
            # Both alone miss where the joint attainment is nothing: their sum still tells.
            reached = margin.all + (margin.ttft + margin.tpot) / 10
            if best is None or reached > best[1]:
                best = (other, min(reached, -1e-9))
        assert best is not None
        return best

    def _lower_rate(
        self, evaluator: Evaluator, design: Design, rate: float, horizon_s: float
    ) -> str:
        """What the design keeps its promises at, where more workers of its kinds do not help."""
        if not design.is_complete:
            return f"more than {self.max_advice} workers more are needed"
        found = evaluator.goodput(
            design, rate * 0.8, num_seeds=1, tolerance=0.05, horizon_s=horizon_s
        )
        if found.rate == 0:
            return "no more workers of these kinds and no lower rate help: other cuts or promises"
        return (
            f"at most {found.rate * self.problem.num_cells:.3g} requests/s; "
            f"{self.max_advice} workers more do not help enough"
        )

    def _floor(self, evaluator: Evaluator, design: Design) -> str:
        """Whether the changed prompts are too long for any number of these workers."""
        if evaluator.traffic is self.problem.traffic:
            return ""
        bounds = bounds_of(self.problem, evaluator.traffic, design.max_step_tokens)
        readers = [w for w, _ in design.counts if w.role is not PoolRole.DECODE]
        for item in self.problem.slo:
            alone = min((bounds.ttft_floor(w, item), w.cut) for w in readers)
            if alone[0] <= item.ttft_s:
                continue
            able = [
                w
                for w in self.problem.found.workers
                if w.role is PoolRole.PREFILL and bounds.ttft_floor(w, item) <= item.ttft_s
            ]
            smallest = min(able, key=lambda w: (w.num_gpus, w.key), default=None)
            to_do = f"prefill with {smallest.cut}" if smallest else "a longer promise"
            return (
                f"{alone[1]} alone needs {alone[0]:.2g} s for the p{item.attainment * 100:g} "
                f"prompt, {item.ttft_s:g} s are promised: {to_do}"
            )
        return ""


def _difference(design: Design, added: Design) -> str:
    """What one design has more than another, and how many GPUs that is."""
    before = dict(design.counts)
    parts = [
        f"{count - before.get(kind, 0)} {kind.label}"
        for kind, count in added.counts
        if count > before.get(kind, 0)
    ]
    return f"{' + '.join(parts)} ({gpus_text(added.num_gpus - design.num_gpus)})"
