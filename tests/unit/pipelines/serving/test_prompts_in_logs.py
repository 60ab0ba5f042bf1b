"""What people ask for is not written to the log: not by us, and not by the libraries."""

from __future__ import annotations

import logging

import pytest
from stepserve.domain.events import Failed, Finished
from stepserve.pipelines.serving.runner import PipelineRunner
from tiny_model import Inbox, a_request

SECRET = "zebra"


@pytest.mark.parametrize("prompt", [SECRET, f"{SECRET} " * 300])
def test_no_prompt_is_logged(
    runner: PipelineRunner,
    prompt: str,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """diffusers would warn, with the words, that a prompt is too long; its loggers print."""
    caplog.set_level(logging.INFO)
    inbox = Inbox()
    runner.submit(a_request(prompt=prompt, negative_prompt=SECRET), inbox)
    outcome = inbox.wait()

    assert isinstance(outcome, Finished | Failed)
    assert isinstance(outcome, Finished) == (prompt == SECRET)
    assert SECRET not in caplog.text
    assert SECRET not in "".join(capfd.readouterr())
