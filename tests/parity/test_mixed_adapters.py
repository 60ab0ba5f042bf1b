"""Requests with different adapters share forwards, and get what plain diffusers with PEFT gives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_families import (
    AdaptedFamily,
    Kind,
    Plain,
    Uses,
    serve_together,
    use,
)
from adapter_writers import layers_of
from families.catalogue import FAMILIES
from families.family import Family, Variation
from families.prompt_lengths import ROOM, WordyVariation, build_roomy
from parity_cases import Forwards
from stepserve.pipelines.serving.runner import PipelineRunner
from torch import Tensor

STEPS = 3
TRIES = 3
# Of float64, as parts of the largest value. What is rounded otherwise grows from step to step.
ROUNDING = 1e-10
# Adapters, scales and seeds that were mixed up would show by far more.
VISIBLE = 1e-4
# Each has another rank or layers of its own, and one says how strong it is by its alpha.
KINDS = {
    "alpha": Kind(rank=4, alpha=10),
    "all": Kind(layers=()),
    "eight": Kind(rank=8, alpha=8),
    "keys": Kind(layers=("to_k",)),
    "large": Kind(rank=16, alpha=16),
    "ranks": Kind(rank=4, ranks={"to_q": 2, "to_v": 6}),
    "small": Kind(rank=2, alpha=2),
    "values": Kind(layers=("to_v", "to_out.0"), rank=3, alpha=3),
}
# Of text encoders: Stable Diffusion's own.
WITH_TEXT = {"text": Kind(text=("q_proj", "v_proj", "fc1"))}
SETS: tuple[Uses, ...] = (
    use("eight"),
    use("large", 0.5),
    use("small", -1.0),
    use("alpha", 0.7),
    (*use("ranks", 0.6), *use("keys", -0.4)),
    (*use("values", 0.8), *use("eight", 0.3)),
    use("keys"),
    (),
    use("eight", 0.25),
    use("ranks"),
    use("values", 1.5),
    (),
)
FAMILY_NAMES = (
    "Stable Diffusion",
    "Stable Diffusion XL",
    "Stable Diffusion 3",
    "FLUX",
    "Qwen-Image",
    "Z-Image",
)
# A UNet and transformers of images and texts in one line are among the others.
SIBLINGS = {"Stable Diffusion XL", "Stable Diffusion 3"}

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    # PEFT's, of adapters whose layers are named alike.
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),
]


@dataclass(frozen=True)
class Served:
    """A family behind an engine, and plain."""

    adapted: AdaptedFamily
    runner: PipelineRunner
    plain: Plain

    def together(self, requests: Sequence[tuple[Variation, Uses]]) -> tuple[list[Tensor], Forwards]:
        """All at once."""
        forwards = Forwards()
        self.runner.engine.observe(forwards)
        return serve_together(self.adapted, self.runner, requests), forwards

    def fewest_forwards(self, sets: Sequence[Uses]) -> int:
        """Of the denoiser, for requests of equal steps.

        By what forwards seem to cost on a busy machine, one may be left to run alone.
        """
        guidance = self.adapted.family.guidance_scales[:1]
        requests = list(zip(variations(guidance, len(sets)), sets, strict=True))
        return min(len(self.together(requests)[1].ids) for _ in range(TRIES))

    def alone(self, variation: Variation, uses: Uses) -> Tensor:
        """One that meets nobody."""
        return self.adapted.submit(self.runner, variation, uses).wait()


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=pytest.mark.slow if name in SIBLINGS else ())
        for name in FAMILY_NAMES
    ],
)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    family = FAMILIES[request.param]
    text = WITH_TEXT if family.name == "Stable Diffusion" else {}
    adapted = AdaptedFamily(family, tmp_path_factory.mktemp("adapted"), KINDS | text)
    adapted.save()
    runner = adapted.runner()
    runner.start()
    yield Served(adapted, runner, adapted.plain())
    runner.stop()


def variations(
    family_guidance: Sequence[float], count: int, steps: Sequence[int] = (STEPS,)
) -> list[Variation]:
    return [
        Variation(i, 100 + i, steps[i % len(steps)], family_guidance[i % len(family_guidance)])
        for i in range(count)
    ]


def difference(one: Tensor, other: Tensor) -> float:
    """As a part of the largest value."""
    assert one.shape == other.shape
    return float((one - other).abs().max() / other.abs().max())


def test_each_image_is_that_of_the_request_alone_and_of_plain_diffusers(served: Served) -> None:
    guidance = served.adapted.family.guidance_scales
    requests = list(zip(variations(guidance, len(SETS), (3, 2, 4)), SETS, strict=True))
    together, _ = served.together(requests)
    for image, (variation, uses) in zip(together, requests, strict=True):
        assert difference(image, served.plain(variation, uses)) < ROUNDING, uses
        assert difference(image, served.alone(variation, uses)) < ROUNDING, uses
    assert served.runner.engine.counters.retries == 0


def test_the_adapters_can_be_seen(served: Served) -> None:
    """Else a mix-up would go unseen."""
    (variation,) = variations((4.0,), 1)
    images = [served.plain(variation, uses) for uses in dict.fromkeys(SETS)]
    for index, one in enumerate(images):
        for other in images[:index]:
            assert difference(one, other) > VISIBLE


def test_different_adapters_take_as_few_forwards_as_one_adapter_for_all(served: Served) -> None:
    one_for_all = [use("eight")] * len(SETS)
    assert served.fewest_forwards(SETS) == served.fewest_forwards(one_for_all)


def test_every_layer_of_a_family_is_applied_beside_others(served: Served) -> None:
    """Those that cannot be applied by row are applied in forwards of their own."""
    requests = list(
        zip(variations((4.0,), 4), (use("all"), use("eight"), (), use("all", -0.5)), strict=True)
    )
    together, _ = served.together(requests)
    for image, (variation, uses) in zip(together, requests, strict=True):
        assert difference(image, served.plain(variation, uses)) < ROUNDING, uses


def lokr(pipeline: Any) -> dict[str, Tensor]:
    """As LyCORIS writes it for Z-Image."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for path in layers_of(pipeline.transformer, "attention.to_q"):
        width = pipeline.transformer.get_submodule(path).in_features
        tensors[f"diffusion_model.{path}.lokr_w1"] = torch.randn(4, 4, generator=generator) * 0.3
        tensors[f"diffusion_model.{path}.lokr_w2"] = torch.randn(
            width // 4, width // 4, generator=generator
        )
        tensors[f"diffusion_model.{path}.alpha"] = torch.tensor(1.0)
    return tensors


def test_lokr_has_forwards_of_its_own(tmp_path: Path) -> None:
    adapted = AdaptedFamily(FAMILIES["Z-Image"], tmp_path, {"lokr": lokr, "eight": Kind(rank=8)})
    adapted.save()
    runner = adapted.runner()
    runner.start()
    served = Served(adapted, runner, adapted.plain())
    sets = (use("lokr"), use("eight"), (), use("lokr"))
    requests = list(zip(variations((4.0,), 4), sets, strict=True))
    together, forwards = served.together(requests)
    runner.stop()
    for image, (variation, uses) in zip(together, requests, strict=True):
        assert difference(image, served.plain(variation, uses)) < ROUNDING, uses
    own, others = {"0", "3"}, {"1", "2"}
    assert all(set(ids) <= own or set(ids) <= others for ids in forwards.ids)
    assert "lokr" in runner.adapters.separate()


def of_two_sizes(family: Family) -> Family:
    """The family with room for long prompts, whose requests are of two sizes in turn."""

    def arguments(pipeline: Any, variation: Variation) -> dict[str, Any]:
        told = family.arguments(pipeline, variation)
        times = 1 + variation.index % 2
        return told | {"max_sequence_length": ROOM, "height": times * told["height"]}

    return replace(family, build=partial(build_roomy, family, None), arguments=arguments)


@pytest.mark.parametrize("name", ["Qwen-Image", "Z-Image"])
def test_rows_of_other_prompt_lengths_and_sizes_have_their_own_adapters(
    name: str, tmp_path: Path
) -> None:
    """In every layer, also of those that get the tokens of all rows in one line."""
    adapted = AdaptedFamily(of_two_sizes(FAMILIES[name]), tmp_path, KINDS)
    adapted.save()
    runner = adapted.runner()
    runner.start()
    served = Served(adapted, runner, adapted.plain())
    sets = (use("all"), use("eight"), (), use("all", -0.5), use("large"), use("all", 0.3))
    requests = [
        (WordyVariation(index, 100 + index, STEPS, 4.0, words=(3, 40)[index // 2 % 2]), uses)
        for index, uses in enumerate(sets)
    ]
    together, _ = served.together(requests)
    runner.stop()
    for image, (variation, uses) in zip(together, requests, strict=True):
        assert difference(image, served.plain(variation, uses)) < ROUNDING, (uses, variation)
