"""The promise: the files of a request are the same in every byte, whatever else is running.

By default where the engine found at its start that the device gives it, and for requests that ask
to be `reproducible` in any case.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import same_bytes_cases
from same_bytes_cases import CoBatchWatch, RandomLoad, request_pool, serve_alone
from same_bytes_cases import serving as serving_model
from stepserve.domain.requests import GenerationRequest
from stepserve.pipelines.probing.sharing_plan import FIXED_ROWS, SharingPlan
from stepserve.pipelines.serving.preparation import SharingOptions
from stepserve.pipelines.serving.runner import PipelineRunner

Say = Callable[[str], None]
Digests = dict[str, tuple[str, ...]]

HISTORIES, MANY_HISTORIES = 100, 500
FLOAT32_HISTORIES = 40
# Requests that are made again elsewhere: each scheduler, task and adapter is among them.
AGAIN = 20
# Rows of a forward under a random load: below, what these tests are about hardly happened.
LEAST_MEAN_ROWS = 3.0
PATIENCE_S = 240.0


@pytest.fixture(scope="module")
def pool(served: PipelineRunner) -> list[GenerationRequest]:
    return request_pool(served.capabilities().schedulers)


@pytest.fixture(scope="module")
def alone(served: PipelineRunner, pool: list[GenerationRequest]) -> Digests:
    """What each request of the pool gives alone."""
    return serve_alone(served, pool)


def must_be_reproducible(runner: PipelineRunner, say: Say) -> bool:
    """Whether the device gives the same bytes to those only that ask for it."""
    if not runner.prepared.plan.same_bytes:
        say("THIS DEVICE DOES NOT GIVE THE SAME BYTES AT ANY LOAD: only reproducible requests")
    return not runner.prepared.plan.same_bytes


def serve_watched(load: RandomLoad, say: Say, histories: int = 0) -> CoBatchWatch:
    """Serve a load, and then more of it until so many different histories are over.

    Those who march in step from end to end have one history between them. How many do depends on
    the machine.
    """
    watch = CoBatchWatch(load.runner.model.pipeline.unet)
    try:
        load.serve()
        while (missing := histories - distinct_histories(load, watch)) > 0:
            assert load.enough < 1.5 * histories, "hardly any history differs"
            load.enough += missing
            load.serve()
    finally:
        watch.remove()
    say(
        f"{load.runner.prepared.plan.row_policy}: {len(load.finished)} finished, {load.cancelled} "
        f"cancelled, {sum(watch.rows)} rows in {len(watch.rows)} forwards: {watch.mean_rows:.1f} "
        f"rows a forward, at most {max(watch.rows)}"
    )
    return watch


def distinct_histories(load: RandomLoad, watch: CoBatchWatch) -> int:
    """Different lists of companies that finished submissions had, step by step."""
    return len({tuple(watch.histories[request.id]) for request, _ in load.finished})


def shared_any(load: RandomLoad, watch: CoBatchWatch) -> int:
    """Finished submissions that shared at least one forward with another."""
    return sum(
        any(len(company) > 1 for company in watch.histories[request.id])
        for request, _ in load.finished
    )


def test_pool_has_everything_and_answers_differ(
    served: PipelineRunner, pool: list[GenerationRequest], alone: Digests
) -> None:
    """Else a mixed-up answer would go unseen."""
    assert {request.scheduler for request in pool[:AGAIN]} == set(served.capabilities().schedulers)
    assert {request.task for request in pool[:AGAIN]} == set(served.capabilities().tasks)
    assert {use.name for request in pool[:AGAIN] for use in request.adapters} == {"first", "second"}
    assert len(set(alone.values())) == len(pool)


@pytest.mark.parametrize(
    "histories", [HISTORIES, pytest.param(MANY_HISTORIES, marks=pytest.mark.slow)]
)
def test_bytes_are_those_of_the_request_alone_over_random_histories(
    served: PipelineRunner, pool: list[GenerationRequest], alone: Digests, say: Say, histories: int
) -> None:
    only_reproducible = must_be_reproducible(served, say)
    if only_reproducible:
        alone = serve_alone(served, [replace(request, reproducible=True) for request in pool])
    share = 1.0 if only_reproducible else 0.05
    load = RandomLoad(served, pool, seed=1, enough=histories, reproducible=share)
    watch = serve_watched(load, say, histories)
    shared, distinct = shared_any(load, watch), distinct_histories(load, watch)
    wrong = load.wrong(alone)
    say(
        f"  {shared} shared forwards, {distinct} different histories, "
        f"{len(load.finished) - len(wrong)} of {len(load.finished)} byte-identical"
    )
    assert wrong == []
    assert distinct >= histories
    assert load.cancelled > 0
    assert served.engine.counters.retries == 0
    if not only_reproducible:
        assert watch.mean_rows > LEAST_MEAN_ROWS
        assert shared > 0.8 * histories


def test_bytes_are_the_same_in_another_process(
    served: PipelineRunner, alone: Digests, model_folder: Path, adapters: Path
) -> None:
    script = Path(same_bytes_cases.__file__)
    arguments = [str(model_folder), str(adapters), "bfloat16", str(AGAIN)]
    printed = subprocess.run(
        [sys.executable, str(script), *arguments],
        check=True,
        stdout=subprocess.PIPE,
        timeout=PATIENCE_S,
    ).stdout
    again = {name: tuple(digests) for name, digests in json.loads(printed).items()}
    assert len(again) == AGAIN
    assert again == {name: alone[name] for name in again}


def test_bytes_are_the_same_from_another_replica_under_load(
    served: PipelineRunner,
    pool: list[GenerationRequest],
    alone: Digests,
    model_folder: Path,
    adapters: Path,
    say: Say,
) -> None:
    share = 1.0 if must_be_reproducible(served, say) else 0.0
    with serving_model(model_folder, "bfloat16", adapters) as replica:
        assert replica.prepared.plan == served.prepared.plan
        assert replica.capabilities().fingerprint == served.capabilities().fingerprint
        load = RandomLoad(replica, pool[:AGAIN], seed=2, enough=2 * AGAIN, reproducible=share)
        serve_watched(load, say)
    assert load.wrong(alone) == []


def float32_plan(folder: Path) -> SharingPlan:
    """The engine's own, with a fixed row count where it needs none."""
    with serving_model(folder, "float32") as runner:
        plan = runner.prepared.plan
    assert plan.same_bytes
    return plan if plan.filled_rows else replace(plan, filled_rows=(FIXED_ROWS,))


def test_forwards_of_one_row_count_give_the_same_bytes_in_float32(
    model_folder: Path, adapters: Path, pool: list[GenerationRequest], say: Say
) -> None:
    sharing = SharingOptions(plan=float32_plan(model_folder))
    with serving_model(model_folder, "float32", adapters, sharing) as runner:
        filled_rows = runner.prepared.plan.filled_rows
        assert FIXED_ROWS in filled_rows
        some = pool[:AGAIN]
        alone = serve_alone(runner, some)
        load = RandomLoad(runner, some, seed=3, enough=FLOAT32_HISTORIES)
        watch = serve_watched(load, say)
        assert runner.engine.counters.padded_rows > 0
    assert load.wrong(alone) == []
    assert set(watch.rows) <= set(filled_rows)
    assert shared_any(load, watch) > 0.6 * FLOAT32_HISTORIES
    # Of so few, those that march in step from end to end weigh more than of many.
    assert distinct_histories(load, watch) > 0.6 * FLOAT32_HISTORIES


def test_reproducible_requests_have_the_same_bytes_where_others_have_not(
    model_folder: Path, adapters: Path, pool: list[GenerationRequest], say: Say
) -> None:
    sharing = SharingOptions(fixed_rows=False)
    with serving_model(model_folder, "float32", adapters, sharing) as runner:
        assert runner.prepared.plan.filled_rows == ()
        assert runner.capabilities().same_bytes is runner.prepared.plan.same_bytes
        some = [replace(request, reproducible=True) for request in pool[:AGAIN]]
        alone = serve_alone(runner, some)
        load = RandomLoad(runner, some, seed=4, enough=FLOAT32_HISTORIES, reproducible=0.5)
        watch = serve_watched(load, say)
    wrong = load.wrong(alone)
    load.finished = [(request, got) for request, got in load.finished if request.reproducible]
    say(f"{len(load.finished)} reproducible ones; {len(wrong)} of the others differ")
    assert load.wrong(alone) == []
    assert len(load.finished) > FLOAT32_HISTORIES // 4
    assert watch.mean_rows > 1.5
