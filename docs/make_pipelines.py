"""Write docs/pipelines.md from what the parity suite finds. It takes some minutes.

python docs/make_pipelines.py
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

import diffusers
import torch
from tqdm import tqdm

DOCS = Path(__file__).parent
TESTS = DOCS.parent / "tests"
sys.path[:0] = [str(TESTS / "parity"), str(TESTS)]

from families.catalogue import FAMILIES  # noqa: E402 - its folder was unknown until here
from families.examine import Findings, examine  # noqa: E402
from families.family import Family  # noqa: E402

HEAD = """\
# Pipelines

Any diffusers pipeline that makes images from a prompt can be served from a local folder,
unmodified. This table is made by `python docs/make_pipelines.py` from the parity suite
(`tests/parity/test_every_family.py`), which builds a tiny pipeline of each family with random
weights, runs four requests of 2, 3, 4 and 5 steps that differ in seed, prompt, guidance, strength
and, where there are several, scheduler, and compares with the same calls made one at a time by
plain diffusers. Pipelines that take several reference images get six requests, with one, two,
three, one, two and three of them.

- **calls per forward**: how many calls of the modules that run at every step shared one forward,
  all requests arriving at once. The most possible is 2.8, as they end one after another (more
  where a strength leaves steps out), and 1.58 with reference images.
  Requests share where shapes agree: the same size, as many reference images of the same sizes, and,
  in pipelines that do not pad their prompts to one length, equally many tokens.
- **float64**, **float32**: largest difference to the plain calls, as a share of the largest value.
  In float64 only mistakes would be left; in float32 there is rounding.
- **bfloat16**: whether results are equal in every bit. Where kernels round by the number of rows
  they need not be; the server finds out for the model and device at hand, and says so in
  `GET /v1/models`.

A pipeline whose class is not in this table gets the same check when it is loaded, before its
requests may share anything. One that fails it is served correctly, one request at a time, and
`sharing_remark` in `GET /v1/models` says why. Components that a call changes while it runs (a text
encoder whose adapter it scales, a VAE that it casts to float32 and back) run inside the call, where
nobody else gets to see the change.

Of these families, those that draw from a prompt alone are also taken the whole way, from a folder
on disk through `load_model` and the engine to an image, for every task that they offer and at
other sizes than the native one; the image is the plain pipeline's
(`tests/parity/test_served_families.py`, which says which tiny models cannot be tried so, and why).
When a model is loaded, each task is probed once at the smallest size. One that raises is not
offered, and a pipeline that makes sizes of its own choice, whatever it is asked for, offers its
native size only.

The suite sees mechanisms, not trained weights; it ran with {versions}.

| family | pipeline class | works | calls per forward | float64 | float32 | bfloat16 |
|---|---|---|---|---|---|---|
"""


def main() -> None:
    """Examine every family and write the table."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rows = [row(family, examine(family)) for family in tqdm(FAMILIES.values())]
    head = HEAD.format(versions=f"diffusers {diffusers.__version__} and torch {torch.__version__}")
    (DOCS / "pipelines.md").write_text(head + "\n".join(rows) + "\n")


def row(family: Family, found: Findings) -> str:
    """One line of the table."""
    worst = max(found.together.difference, found.staggered.difference, found.unmerged.difference)
    double = "not possible" if found.float64 is None else f"{found.float64.difference:.0e}"
    cells = (
        family.name,
        f"`{found.pipeline}`",
        works(family, found),
        f"{found.together.calls_per_forward:.2f}",
        double,
        f"{worst:.0e}",
        half_precision(found),
    )
    return f"| {' | '.join(cells)} |"


def works(family: Family, found: Findings) -> str:
    """Whether it works, and what it needs."""
    if found.plan.serial:
        return f"one request at a time: {found.plan.remark}"
    return "; ".join(filter(None, ["yes", found.plan.remark, family.remark]))


def half_precision(found: Findings) -> str:
    """What came of bfloat16."""
    if found.bfloat16 is None:
        return "not possible"
    return "equal" if found.bfloat16.difference == 0 else f"{found.bfloat16.difference:.0e}"


if __name__ == "__main__":
    main()
