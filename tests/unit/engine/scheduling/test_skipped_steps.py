"""Skipped steps in all that counts and predicts."""

from __future__ import annotations

from dataclasses import replace

import pytest
from skipping_requests import Drawing, Site
from stepserve.domain.states import RequestState
from stepserve.engine.loop.engine import Engine, EngineOptions
from stepserve.engine.scheduling.estimator import MOST_SHARES
from stepserve.engine.tracks.track import Track

SCHEDULE = frozenset(range(0, 24, 2))


def track_of(site: Site, drawing: Drawing, name: str = "new") -> Track:
    return replace(drawing.track(site.bench, site.control, name), clock=site.bench.clock)


@pytest.fixture
def site() -> Site:
    return Site()


def run_of(site: Site, drawing: Drawing) -> int:
    """How many denoiser calls of a request run."""
    site.add(drawing)
    site.bench.run()
    return site.watcher.skipped_calls[-1][1]


def test_what_runs_is_all_until_it_was_seen(site: Site) -> None:
    drawing = Drawing(1, threshold=0.3)
    estimator = site.bench.estimator
    assert estimator.demand(track_of(site, drawing)).steps == 24
    assert estimator.run_shares() == {}

    run = run_of(site, drawing)
    assert run < 20
    assert estimator.run_shares() == {"0.3": pytest.approx(run / 24)}
    demand = estimator.demand(track_of(site, drawing))
    assert demand.steps == run
    # Nothing is known of others, and what skips nothing is counted as ever.
    assert estimator.demand(track_of(site, replace(drawing, threshold=0.2))).steps == 24
    plain = estimator.demand(replace(track_of(site, drawing), step_cache=None))
    assert plain.steps == 24
    assert demand.serial_s == pytest.approx(plain.serial_s * run / 24)


def test_the_share_follows_what_is_seen(site: Site) -> None:
    drawing = Drawing(1, threshold=1e9)
    run_of(site, drawing)
    before = site.bench.estimator.run_shares()["1000000000.0"]
    assert before == pytest.approx(4 / 24)
    # Of the same kind, and nothing of it is skipped.
    site.add(replace(drawing, steps=4), step_cache=replace(drawing, steps=4).cache)
    site.bench.run()
    assert before < site.bench.estimator.run_shares()["1000000000.0"] < 1


def test_a_schedule_is_counted_exactly_at_any_moment(site: Site) -> None:
    drawing = Drawing(1, skipped=SCHEDULE)
    track = track_of(site, drawing)
    # 4, 6, ..., 20 and 22 are skipped: the first three and the last one run.
    assert site.bench.estimator.demand(track).steps == 14
    site.bench.batcher.scheduler.add(track)
    while not track.ended:
        expected = site.bench.estimator.demand(track).steps
        done = len(site.rows_of("new"))
        assert expected + done == 14
        site.bench.run(1)


def test_a_forecast_holds_for_requests_that_skip(site: Site) -> None:
    drawing = Drawing(1, threshold=0.3)
    run_of(site, drawing)
    track = track_of(site, drawing)
    (expected_s,) = site.bench.finish_times_s(track)
    started_s = site.bench.clock()
    site.bench.batcher.scheduler.add(track)
    site.bench.run()
    assert site.bench.clock() - started_s == pytest.approx(expected_s, rel=0.05)


def test_a_deadline_that_only_skipping_meets_is_promised(site: Site) -> None:
    drawing = Drawing(1, threshold=0.3)
    engine = Engine(EngineOptions(max_rows=32), clock=site.bench.clock)

    def serve(track: Track) -> None:
        engine.submit(track)
        engine._take_commands(wait=False)
        while engine.batcher.tick():
            pass

    serve(track_of(site, drawing, "first"))
    run = round(24 * engine.run_shares()["0.3"])
    step_s = 0.040 + 2 * 0.002
    assert run < 20
    promised = replace(track_of(site, drawing, "second"), deadline_s=1.2 * run * step_s)
    serve(promised)
    assert promised.steps_done == 24
    assert promised.state is RequestState.FINISHED
    engine.stop()


def test_few_kinds_are_kept(site: Site) -> None:
    for number in range(MOST_SHARES + 5):
        site.add(Drawing(1, steps=1, threshold=float(number)))
        site.bench.run()
    shares = site.bench.estimator.run_shares()
    assert list(shares) == [f"{number}.0" for number in range(5, MOST_SHARES + 5)]
