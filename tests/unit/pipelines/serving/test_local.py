from __future__ import annotations

import pytest
import torch
from stepserve.domain.errors import InvalidRequestError
from stepserve.pipelines.loading.folders import LoadedModel
from stepserve.pipelines.requests.call import make_images
from stepserve.pipelines.serving.local import generate_locally
from tiny_model import MAX_TOKENS, a_request, pixels


def test_a_request_is_served_as_the_plain_pipeline_would(
    tiny: LoadedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    request = a_request(n=2, num_inference_steps=3)
    finished = generate_locally(tiny, request)
    with torch.no_grad():
        wanted = make_images(tiny, request)
    assert [pixels(image.data) for image in finished.images] == [w.tobytes() for w in wanted]
    assert "denoising" in capsys.readouterr().err


def test_it_can_be_called_again_and_leaves_nothing_behind(tiny: LoadedModel) -> None:
    first, second = (generate_locally(tiny, a_request()) for _ in range(2))
    assert first.images == second.images
    assert "forward" not in vars(tiny.pipeline.unet)


def test_refusals_are_raised(tiny: LoadedModel) -> None:
    with pytest.raises(InvalidRequestError, match="tokens long"):
        generate_locally(tiny, a_request(prompt="a" * MAX_TOKENS))
    assert "forward" not in vars(tiny.pipeline.unet)


def test_failures_are_raised(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise InvalidRequestError("no", "prompt")

    monkeypatch.setattr("stepserve.pipelines.serving.listener.make_in_phases", broken)
    with pytest.raises(InvalidRequestError, match="no"):
        generate_locally(tiny, a_request())
