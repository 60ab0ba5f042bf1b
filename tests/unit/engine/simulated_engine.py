"""Requests at random moments to the real engine, on a fake clock.

An engine that was never started is turned by hand: its admission, forecasts, policy and
batcher are the real ones, and only forwards take as long as the clock is told.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import torch
from engine_fakes import Denoiser, Ear, Job, Modules, job_track
from stepserve.domain.errors import RefusedError
from stepserve.engine.loop.engine import Engine, EngineOptions
from stepserve.engine.tracks.track import Track

STEPS = {4: 0.25, 10: 0.25, 20: 0.35, 50: 0.15}
GUIDED = 0.8
MAX_ROWS = 32
MANY = 10**6
WARM_UP = 60


class NoisyDenoiser(Denoiser):
    """Takes a tenth more or less than it should, and now and then three times as long."""

    chance: random.Random

    def spend(self, value: torch.Tensor) -> None:
        started_s = self.clock.now_s
        super().spend(value)
        factor = self.chance.lognormvariate(0.0, 0.1)
        factor *= 3.0 if self.chance.random() < 0.003 else 1.0
        self.clock.now_s = started_s + (self.clock.now_s - started_s) * factor


@dataclass(frozen=True)
class Traffic:
    """What comes to the engine.

    Args:
        per_s: requests a second, at random moments that depend on nothing (Poisson).
        slack: deadlines, in multiples of what the request takes alone.
        without_deadline: the share of requests that have none.
    """

    per_s: float
    count: int = 360
    slack: float = 3.0
    without_deadline: float = 0.0
    seed: int = 1


@dataclass
class Score:
    """What became of the requests after the warm-up."""

    seconds: float
    refused: list[RefusedError] = field(default_factory=list)
    met: list[Track] = field(default_factory=list)
    missed: list[Track] = field(default_factory=list)
    finished: list[Track] = field(default_factory=list)

    @property
    def met_share(self) -> float:
        """Of accepted requests with a deadline."""
        return len(self.met) / (len(self.met) + len(self.missed))

    @property
    def goodput_per_s(self) -> float:
        """Requests that were finished, in time where they have a deadline, by the second."""
        return len(self.finished) / self.seconds


class SimulatedEngine:
    """One engine and the requests that come to it."""

    def __init__(self, traffic: Traffic) -> None:
        self.traffic, self.chance = traffic, random.Random(traffic.seed)
        self.modules = Modules(max_rows=MAX_ROWS)
        self.modules.denoiser.__class__ = NoisyDenoiser
        assert isinstance(self.modules.denoiser, NoisyDenoiser)
        self.modules.denoiser.chance = random.Random(traffic.seed + 1)
        self.clock = self.modules.clock
        options = EngineOptions(max_rows=MAX_ROWS, max_pending_images=MANY)
        self.engine = Engine(options, clock=self.clock)
        self.tracks: list[Track] = []
        self.refused: dict[str, RefusedError] = {}

    def run(self) -> Score:
        """Let everything come, and turn the engine until it is done with it."""
        next_s, warm_s = self.clock.now_s, self.clock.now_s
        while self.turn() or len(self.tracks) < self.traffic.count:
            if not self.engine._in_flight:
                self.clock.now_s = max(self.clock.now_s, next_s)
            while len(self.tracks) < self.traffic.count and self.clock.now_s >= next_s:
                self.submit(self.draw())
                next_s += self.chance.expovariate(self.traffic.per_s)
                warm_s = next_s if len(self.tracks) == WARM_UP else warm_s
        self.engine.stop()
        return self.score(max(next_s - warm_s, self.clock.now_s - warm_s))

    def turn(self) -> bool:
        """What the engine's thread does again and again."""
        self.engine._take_commands(wait=False)
        return self.engine.batcher.tick()

    def draw(self) -> Track:
        """The next request."""
        steps = self.chance.choices(list(STEPS), weights=list(STEPS.values()))[0]
        job = Job(len(self.tracks), steps, rows=2 if self.chance.random() < GUIDED else 1)
        patient = self.chance.random() < self.traffic.without_deadline
        deadline_s = None if patient else self.traffic.slack * serial_s(job)
        return replace(job_track(self.modules, job), deadline_s=deadline_s, clock=self.clock)

    def submit(self, track: Track) -> None:
        """Knock."""
        self.tracks.append(track)
        try:
            self.engine.submit(track)
        except RefusedError as error:
            self.refused[track.id] = error

    def score(self, seconds: float) -> Score:
        """Of what came after the warm-up."""
        score = Score(seconds)
        for track in self.tracks[WARM_UP:]:
            if track.id in self.refused:
                score.refused.append(self.refused[track.id])
                continue
            ear = track.listener
            assert isinstance(ear, Ear)
            assert ear.timings is not None
            in_time = track.deadline_s is None or ear.timings.total_s <= track.deadline_s
            if in_time and ear.ends == ["finished"]:
                score.finished.append(track)
            if track.deadline_s is not None:
                (score.met if in_time else score.missed).append(track)
        return score


def serial_s(job: Job) -> float:
    """What a request takes alone, without noise: encoder, steps, decoder."""
    return 0.007 + 0.0011 * job.rows + job.steps * (0.040 + 0.002 * job.rows)


def capacity_per_s(count: int = 200) -> float:
    """Requests a second that an engine finishes which always has a queue."""
    traffic = Traffic(per_s=1e9, count=count + WARM_UP, without_deadline=1.0)
    score = SimulatedEngine(traffic).run()
    return (count + WARM_UP) / score.seconds
