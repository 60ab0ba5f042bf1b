"""Samples of stacks become shares of CPU time."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, cast

import pytest

from loadtests.breakdown import part_of, read_stacks, requests_ended, shares_of

FORWARD = (
    "_main (/x/service/stepserve/engine/loop/engine.py)",
    "_run_shared (/x/service/stepserve/engine/loop/batcher.py)",
    "forward (/x/diffusers/models/unets/unet_2d_condition.py)",
    "forward (/x/torch/nn/modules/conv.py)",
)
SCHEDULER = ("step (/x/diffusers/schedulers/scheduling_ddim.py)",)


@pytest.mark.parametrize(
    ("stack", "part"),
    [
        (FORWARD, "denoiser forwards"),
        (FORWARD[:2], "engine, besides"),
        (("_decode (/x/diffusers/models/autoencoders/autoencoder_kl.py)",), "decoding latents"),
        ((*FORWARD[:1], *SCHEDULER), "scheduler steps"),
        (("pick (/x/service/stepserve/engine/scheduling/policy.py)",), "engine: deciding"),
    ],
)
def test_a_stack_belongs_to_what_is_deepest_in_the_work(stack: tuple[str, ...], part: str) -> None:
    assert part_of(stack) == part


def test_stacks_are_read_as_py_spy_writes_them(tmp_path: Path) -> None:
    file = tmp_path / "stacks.txt"
    file.write_text("a (x y.py);b (z.py) 3\na (x y.py) 2\na (x y.py);b (z.py) 1\n")
    assert read_stacks(file) == Counter({("a (x y.py)", "b (z.py)"): 4, ("a (x y.py)",): 2})


def test_an_engine_is_divided_and_others_are_not() -> None:
    roles, used_s, engines_s = {1: "replica", 2: "ingress"}, {1: 9.0, 2: 1.0}, {1: 8.0}
    elsewhere = ("run (/x/ray/serve.py)",)
    in_a_track = ("run_with (/x/service/stepserve/pipelines/adapters/cache.py)", *SCHEDULER)
    stacks = {
        1: Counter({FORWARD: 6, FORWARD[:1]: 1, in_a_track: 1, elsewhere: 50}),
        2: Counter({elsewhere: 1}),
    }
    told = shares_of(roles, used_s, engines_s, cast(Any, stacks), machine_s=20.0, requests=4)
    shares = {share.part: share for share in told}
    assert shares["denoiser forwards"].of_machine == pytest.approx(6 / 20)
    assert shares["denoiser forwards"].ms_per_request == pytest.approx(1500)
    assert shares["engine, besides"].of_machine == pytest.approx(1 / 20)
    assert shares["scheduler steps"].of_machine == pytest.approx(1 / 20)
    assert shares["Ray and events in the replica"].of_machine == pytest.approx(1 / 20)
    assert shares["ingress"].of_machine == pytest.approx(1 / 20)
    assert sum(share.of_machine for share in shares.values()) == pytest.approx(1)


def test_requests_are_counted_over_all_labels() -> None:
    page = "# HELP stepserve_requests_total x\n" + "\n".join(
        [
            'stepserve_requests_total{model="emoji",outcome="ok"} 3',
            'stepserve_requests_total{model="emoji",outcome="cancelled"} 2',
            'stepserve_request_retries_total{model="emoji"} 9',
        ]
    )
    assert requests_ended(page) == 5
