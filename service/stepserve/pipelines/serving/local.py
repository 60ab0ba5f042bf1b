"""A request served in this process, with a progress bar: the engine without a server."""

from __future__ import annotations

from queue import SimpleQueue

from tqdm import tqdm

from stepserve.domain.events import Event, Failed, Finished, StepFinished
from stepserve.domain.requests import GenerationRequest
from stepserve.pipelines.adapters.files import AdapterOptions
from stepserve.pipelines.loading.folders import LoadedModel
from stepserve.pipelines.probing.sharing_plan import SharingPlan
from stepserve.pipelines.serving.preparation import SharingOptions
from stepserve.pipelines.serving.runner import PipelineRunner


def generate_locally(
    model: LoadedModel, request: GenerationRequest, adapters: AdapterOptions | None = None
) -> Finished:
    """Run one request through an engine of its own and wait for its images.

    Raises:
        StepserveError: the request was refused or failed.
    """
    # There is nobody to share with, so nothing to find out about that.
    unshared = SharingOptions(plan=SharingPlan())
    runner = PipelineRunner(model, adapters=adapters, sharing=unshared)
    runner.start()
    events: SimpleQueue[Event] = SimpleQueue()
    try:
        runner.submit(request, events.put)
        return _follow(events)
    finally:
        runner.stop()


def _follow(events: SimpleQueue[Event]) -> Finished:
    accepted = events.get()
    if isinstance(accepted, Failed):
        # Refused: there is no progress to show.
        raise accepted.error
    with tqdm(desc="denoising", unit="step", leave=False) as bar:
        while True:
            match events.get():
                case StepFinished(step=step, steps=steps):
                    bar.total = steps
                    bar.update(step - bar.n)
                case Failed(error=error):
                    raise error
                case Finished() as finished:
                    return finished
