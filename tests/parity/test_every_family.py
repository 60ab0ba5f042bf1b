"""Every family of pipelines: what requests get at once is what each gets alone.

In float64 results are equal to rounding, which proves the mathematics; in float32 they are within a
stated bound, at once and staggered, merged and unmerged; in bfloat16 they are equal in every bit
where the device gives a row the same bits in any company. A family that should share forwards fails
here if it does not.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families.catalogue import FAMILIES, VIDEOS
from families.examine import Findings, examine, make_probe_requests
from families.family import Family, resident
from stepserve.pipelines.facts.verified_families import VERIFIED
from stepserve.pipelines.probing.sharing_check import ENOUGH_ROWS, check_sharing
from stepserve.pipelines.probing.sharing_plan import plan_co_batching

FLOAT64_BOUND = 1e-6
FLOAT32_BOUND = 2e-4
# Videos are not served; one family stands for what they have in common.
WIDEST = VIDEOS - {"Wan 2.1, text to video"}
# Each has siblings here with the same UNet and the same networks beside it, and
# `test_served_families` tries them all.
SERVED = {
    "InstructPix2Pix",
    "Latent consistency model",
    "Stable Diffusion with a T2I-Adapter",
    "Stable Diffusion with an IP-Adapter, several references",
    "Stable Diffusion with two ControlNets",
    "Stable Diffusion with two IP-Adapters",
}
TABLE = Path(__file__).parents[2] / "docs" / "pipelines.md"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "family",
    [
        # Each takes seconds.
        pytest.param(family, marks=pytest.mark.slow if name in WIDEST | SERVED else (), id=name)
        for name, family in FAMILIES.items()
    ],
)
def test_requests_get_at_once_what_each_gets_alone(family: Family) -> None:
    found = examine(family)
    reports = [found.together, found.staggered, found.unmerged]
    reports += [report for report in (found.float64, found.bfloat16) if report is not None]
    assert [report.objection for report in reports] == [""] * len(reports)
    assert all(report.difference <= FLOAT32_BOUND for report in reports[:3])
    # Else a mixed-up row would go unseen.
    assert found.together.separation > 100 * FLOAT32_BOUND
    assert found.float64 is None or found.float64.difference <= FLOAT64_BOUND
    check_shared(family, found)
    check_bfloat16(found)


def check_shared(family: Family, found: Findings) -> None:
    assert found.plan.serial is not family.shares
    assert found.unmerged.forwards == found.unmerged.calls
    if found.plan.serial:
        assert found.plan.remark
        assert found.together.forwards == found.together.calls
    else:
        assert found.together.calls_per_forward >= family.least_sharing


def check_bfloat16(found: Findings) -> None:
    if found.bfloat16 is not None and found.independent:
        assert found.bfloat16.difference == 0


@pytest.mark.filterwarnings("ignore:.*upcast_vae:FutureWarning")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("Stable Diffusion XL", torch.float16),
        ("Stable Diffusion XL, image to image", torch.bfloat16),
    ],
)
def test_a_vae_that_the_call_casts_runs_inside_the_call(name: str, dtype: torch.dtype) -> None:
    """The pipeline makes the shared VAE float32 for its own decode, or encode, and back."""
    pipeline = FAMILIES[name].build().to(dtype)
    probes = make_probe_requests(FAMILIES[name], pipeline)
    plan = plan_co_batching(pipeline, probes, verified=())
    assert (plan.serial, plan.inline) == (False, frozenset({"vae"}))
    assert "vae" in plan.remark
    report = check_sharing(pipeline, probes, options=plan.parking(ENOUGH_ROWS))
    assert report.objection == ""
    assert pipeline.vae.dtype == dtype


def test_the_list_of_verified_pipelines_is_that_of_the_suite() -> None:
    """Any other class is tried when it is loaded."""
    shared = [family for family in FAMILIES.values() if family.shares]
    assert {type(resident(family)).__name__ for family in shared} == VERIFIED


def test_the_table_in_the_docs_has_every_family() -> None:
    table = TABLE.read_text()
    assert [name for name in FAMILIES if f"| {name} |" not in table] == []
