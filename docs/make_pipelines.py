"""Write docs/pipelines.md from what the parity suite finds. It takes some minutes.

python docs/make_pipelines.py           the whole page
python docs/make_pipelines.py prompts   its section about prompts only, in a minute
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
PAGE = DOCS / "pipelines.md"
TESTS = DOCS.parent / "tests"
sys.path[:0] = [str(TESTS / "parity"), str(TESTS)]

from families.catalogue import FAMILIES  # noqa: E402 - its folder was unknown until here
from families.examine import Findings, examine  # noqa: E402
from families.family import Family, resident  # noqa: E402
from families.prompt_lengths import measure, reason  # noqa: E402
from served_families.reaches import REACHES, TRIED_ELSEWHERE, UNREACHED  # noqa: E402
from stepserve.engine.calls.text_padding import LENGTHS  # noqa: E402
from stepserve.pipelines.facts.signature import read_signature  # noqa: E402
from stepserve.pipelines.modules.parking import fills_text, takes_lengths  # noqa: E402
from stepserve.pipelines.probing.sharing_check import SharingReport  # noqa: E402

HEAD = """\
# Pipelines

A diffusers pipeline that makes images is served from a local folder, unmodified, if requests can
give all that its call needs: a prompt, a class, images, or nothing.

This table is made by `python docs/make_pipelines.py` from the parity suite
(`tests/parity/test_every_family.py`), which builds a tiny pipeline of each family with random
weights, runs four requests of 2, 3, 4 and 5 steps that differ in seed, prompt, guidance, strength
and, where there are several, scheduler, and compares with the same calls made one at a time by
plain diffusers. Pipelines that take several reference images get six requests, with one, two,
three, one, two and three of them.

- **calls per forward**: how many calls of the modules that run at every step shared one forward,
  all requests arriving at once. The most possible is 2.8, as they end one after another (more
  where a strength leaves steps out), and 1.58 with reference images.
  Requests share where shapes agree: the same size, and as many reference images of the same sizes.
  Those to Z-Image share [whatever their sizes](performance.md#the-settings-of-an-engine), where
  one forward for all costs less than one for each.
  Where [prompts of any length](#prompts-of-any-length) share is told below.
- **float64**, **float32**: largest difference to the plain calls, as a share of the largest value.
  In float64 only mistakes would be left; in float32 there is rounding.
- **bfloat16**: whether results are equal in every bit, to those of the plain calls or, where texts
  are filled up, to those that an engine gives one request after another. Where kernels round by
  the number of rows they need not be; the server finds out for the model and device at hand, and
  says so in `GET /v1/models`.

A pipeline whose class is not in this table gets the same check when it is loaded, before its
requests may share anything. One that fails it is served correctly, one request at a time, and
`sharing_remark` in `GET /v1/models` says why. Components that a call changes while it runs (a text
encoder whose adapter it scales, a VAE that it casts to float32 and back) run inside the call, where
nobody else gets to see the change.

The column **HTTP call** names the call that reaches a family, and its fields beside those that
every call has (size, steps, scales, seed). Each is tried
(`tests/parity/test_served_families.py`): the tiny model is saved as a folder and loaded as
`stepserve serve` loads it; two requests that differ in prompt, seed, steps, guidance and images
come in over HTTP at once; some forward has rows of both, unless the table says that it cannot; and
both images are within 2 of 255 levels of the plain pipeline's in float32. Upscalers are tried by
`tests/parity/test_upscalers_over_http.py`, and edits by forms, of several sizes, by
`tests/parity/test_served_edits.py`. [Families that no call
reaches](#families-that-no-call-reaches) stand below the table, with the reason.

When a model is loaded, each task is probed once at the smallest size. One that raises is not
offered, and a pipeline that makes sizes of its own choice, whatever it is asked for, offers its
native size only.

The suite sees mechanisms, not trained weights; it ran with {versions}.

| family | pipeline class | HTTP call | works | calls per forward | float64 | float32 | bfloat16 |
|---|---|---|---|---|---|---|---|
"""
TAIL = """
## Families that no call reaches

Their calls share forwards in the engine, as the table shows, and no request asks for them, or the
tiny model of the tests cannot be loaded from a folder. Pipelines that make videos are not served.

"""


PROMPTS_HEADING = "## Prompts of any length"
PROMPTS = """\

Many pipelines fill every prompt up to one length by themselves. Others have as many tokens as the
prompt, and requests would share forwards only where they happen to have equally many. Where a
model's forward takes a mask, Stepserve fills the text up with zeros that the mask keeps out of
attention, to the next of {lengths} tokens (longer ones stay
as they are). In exact arithmetic nothing changes; in floating point the last bits are others than
in plain diffusers, as attention with a mask is another kernel. They do not depend on other
requests: the length follows from the request alone, and the mask is always given, also where
nothing is filled in.

What it costs follows from the tokens of the image beside which the text stands. Prompts of 20
tokens become 128, so 108 are added: to 4,096 of an image of 1024x1024 (2.6 % more work in
the linear layers, 5.3 % in attention), to 1,024 of 512x512 (10 % and 22 %). The text of
a Qwen-Image, 3,584 numbers a token, takes 0.9 MB more a row in bfloat16. Attention with a
mask is slower than without on some devices, and some kernels take no mask: with
`attention_backend` set to one of these, nothing is filled in
([performance.md](performance.md#attention_backend)). A service that has one request at a time, or
wants the very bits of diffusers, sets `engine.pad_prompts: false`.

This table is made by `python docs/make_pipelines.py prompts`, and
`tests/parity/test_prompt_lengths.py` holds the code to it: three requests, with prompts of 3, 20
and 60 words (each a token or more), at once. The most calls that a forward can serve are 3.
*Of one length*: the pipeline fills every prompt up by itself. *Filled up by Stepserve*: as told
above. *Filled up by its forward*: the denoiser takes a list with an entry for each row. *Takes
none*: there is no prompt.

| family | calls per forward | float64 | prompts |
|---|---|---|---|
"""


def main() -> None:
    """Examine every family and write the page, or its section about prompts."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    before = whole_table() if sys.argv[1:] != ["prompts"] else PAGE.read_text()
    before = before.partition(PROMPTS_HEADING)[0].rstrip("\n")
    PAGE.write_text(f"{before}\n\n{PROMPTS_HEADING}\n{prompts_table()}\n")


def whole_table() -> str:
    """All of the page but its section about prompts."""
    rows = [row(family, examine(family)) for family in tqdm(FAMILIES.values())]
    head = HEAD.format(versions=f"diffusers {diffusers.__version__} and torch {torch.__version__}")
    return head + "\n".join(rows) + "\n" + TAIL + "\n".join(reasons())


def prompts_table() -> str:
    """How prompts of other lengths share, for each family."""
    rows = [prompts_row(family, measure(family)) for family in tqdm(FAMILIES.values())]
    return PROMPTS.format(lengths=", ".join(map(str, LENGTHS))) + "\n".join(rows)


def prompts_row(family: Family, found: SharingReport) -> str:
    """One line of that table."""
    cells = (
        family.name,
        f"{found.calls_per_forward:.2f}",
        f"{found.difference:.0e}" if family.float64 else "not possible",
        reason(family) or prompts_become(family),
    )
    return f"| {' | '.join(cells)} |"


def prompts_become(family: Family) -> str:
    """How prompts of other lengths come to share."""
    if fills_text(resident(family)):
        return "filled up by Stepserve"
    if takes_lengths(resident(family)):
        return "filled up by its forward"
    takes_prompts = read_signature(type(resident(family))).accepts("prompt")
    return "of one length" if takes_prompts else "takes none"


def row(family: Family, found: Findings) -> str:
    """One line of the table."""
    worst = max(found.together.difference, found.staggered.difference, found.unmerged.difference)
    double = "not possible" if found.float64 is None else f"{found.float64.difference:.0e}"
    cells = (
        family.name,
        f"`{found.pipeline}`",
        http_call(family),
        works(family, found),
        f"{found.together.calls_per_forward:.2f}",
        double,
        f"{worst:.0e}",
        half_precision(found),
    )
    return f"| {' | '.join(cells)} |"


def http_call(family: Family) -> str:
    """What reaches a family, or that nothing does."""
    if (reach := (REACHES | TRIED_ELSEWHERE).get(family.name)) is not None:
        return reach.describe()
    makes = read_signature(type(resident(family))).makes
    return "none: see below" if makes == "images" else f"none: makes {makes}"


def reasons() -> list[str]:
    """Why no call reaches a family that makes images."""
    return [f"- **{name}**: {reason}." for name, reason in sorted(UNREACHED.items())]


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
