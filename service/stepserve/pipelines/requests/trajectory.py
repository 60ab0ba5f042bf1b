"""Records a request's own steps: what each began with, and which clean sample it predicted."""

from __future__ import annotations

import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from PIL import Image

from stepserve.domain.checks.trajectory_limits import check_trajectory_bytes, shown_step_bytes
from stepserve.domain.errors import InvalidRequestError, ServerFullError
from stepserve.domain.events import EncodedTrajectory, TrajectoryStep
from stepserve.domain.requests import GenerationRequest, TrajectoryFormat, TrajectoryRequest
from stepserve.pipelines.requests.images import (
    MEDIA_TYPES,
    PARAMETERS_KEY,
    encode_preview,
    parameters_of,
)
from stepserve.pipelines.requests.previews import (
    Denoised,
    Observed,
    decode_latents,
    is_variance_exploding,
    noise_level,
)

MOST_HELD_BYTES = 256 * 2**20
RETRY_AFTER_S = 2.0
SAFETENSORS_MEDIA_TYPE = "application/vnd.safetensors"

Images = Sequence[Image.Image | None]
"""None in place of one that the pipeline's own safety checker withheld."""


class TrajectoryRoom:
    """Bytes of all trajectories that one replica holds: counted, and bounded."""

    def __init__(self, most_bytes: int = MOST_HELD_BYTES) -> None:
        self._most_bytes = most_bytes
        self._lock = threading.Lock()
        self.held_bytes = 0

    def take(self, size_bytes: int) -> None:
        """Hold so many bytes more.

        Raises:
            ServerFullError: there is no room for them.
        """
        with self._lock:
            if self.held_bytes + size_bytes > self._most_bytes:
                raise ServerFullError(
                    f"the server is full: trajectories in flight hold {self.held_bytes} bytes, the "
                    f"limit is {self._most_bytes}, and this one takes {size_bytes} more",
                    RETRY_AFTER_S,
                )
            self.held_bytes += size_bytes

    def give_back(self, size_bytes: int) -> None:
        """Hold so many bytes less."""
        with self._lock:
            self.held_bytes -= size_bytes


@dataclass(frozen=True)
class RecordedTensors:
    """One step of all images of a request, on the CPU.

    Args:
        step: from 1.
        timestep: as the scheduler was given it, without dimensions.
        x_t: of shape (images, ...), as the scheduler was given it.
        x_0: float32 and of the shape of x_t; None where the network's output does not tell it.
    """

    step: int
    timestep: torch.Tensor
    x_t: torch.Tensor
    x_0: torch.Tensor | None


@dataclass(frozen=True)
class RecordedImages:
    """One step of all images of a request, decoded."""

    step: int
    timestep: float
    x_t: Images | None
    x_0: Images | None


class Trajectory(ABC):
    """What is recorded of one request. Its bytes are counted from its first step until `release`.

    Args:
        request: whose steps they are.
        wanted: what it says of them.
        room: where its bytes are counted.
    """

    def __init__(
        self, request: GenerationRequest, wanted: TrajectoryRequest, room: TrajectoryRoom
    ) -> None:
        self.request = request
        self.wanted = wanted
        self._room = room
        self._taken_bytes = 0
        # What the latest step made.
        self.latents: torch.Tensor | None = None

    @property
    @abstractmethod
    def is_empty(self) -> bool:
        """Whether no step is recorded."""

    @abstractmethod
    def step_bytes(self, seen: Denoised) -> int:
        """What one step takes."""

    @abstractmethod
    def add(self, pipeline: Any, observed: Observed, seen: Denoised, step: int) -> None:
        """Record a step."""

    @abstractmethod
    def encode(self, index: int) -> EncodedTrajectory:
        """The trajectory of image `index` of the request."""

    def take_room(self, seen: Denoised, steps: int) -> None:
        """Count the bytes of all steps, once the size of one is known.

        Raises:
            InvalidRequestError: they are more than a request may have.
            ServerFullError: others hold too many.
        """
        size_bytes = check_trajectory_bytes(self.wanted, steps, self.step_bytes(seen))
        self._room.take(size_bytes)
        self._taken_bytes = size_bytes

    def finish(self) -> None:
        """The pipeline call has ended.

        Raises:
            InvalidRequestError: no step was seen.
        """
        if self.is_empty:
            raise cannot_be_seen(self.request)

    def release(self) -> None:
        """It is sent, or will not be. Calling it again changes nothing."""
        taken_bytes, self._taken_bytes = self._taken_bytes, 0
        self._room.give_back(taken_bytes)


class TensorTrajectory(Trajectory):
    """Keeps what the scheduler had, in its own layout and dtype."""

    def __init__(
        self, request: GenerationRequest, wanted: TrajectoryRequest, room: TrajectoryRoom
    ) -> None:
        super().__init__(request, wanted, room)
        self._steps: list[RecordedTensors] = []

    @property
    def is_empty(self) -> bool:
        """Whether no step is recorded."""
        return not self._steps

    def step_bytes(self, seen: Denoised) -> int:
        """What x_t and a float32 x_0 of all images take."""
        elements = seen.sample[: self.request.n].numel()
        return elements * (seen.sample.element_size() + torch.float32.itemsize)

    def add(self, pipeline: Any, observed: Observed, seen: Denoised, step: int) -> None:
        """Copy what a step began with, as pipelines may write into it."""
        predicted = observed.predict()
        recorded = RecordedTensors(
            step,
            torch.as_tensor(seen.timestep).detach().reshape(-1)[0].to("cpu", copy=True),
            self._copied(seen.sample),
            None if predicted is None else self._copied(predicted),
        )
        self._steps.append(recorded)

    def finish(self) -> None:
        """Copy what the last step made."""
        super().finish()
        self.latents = None if self.latents is None else self._copied(self.latents)

    def encode(self, index: int) -> EncodedTrajectory:
        """One file; equal steps and parameters give the same bytes."""
        steps = self._steps
        tensors = {
            "steps": torch.tensor([recorded.step for recorded in steps]),
            "timesteps": torch.stack([recorded.timestep for recorded in steps]),
            "x_t": torch.stack([recorded.x_t[index] for recorded in steps]),
        }
        predicted = [recorded.x_0[index] for recorded in steps if recorded.x_0 is not None]
        if len(predicted) == len(steps):
            tensors["x_0"] = torch.stack(predicted)
        if self.latents is not None:
            tensors["latents"] = self.latents[index].clone(memory_format=torch.contiguous_format)
        # One entry: several would come in another order each time.
        metadata = {PARAMETERS_KEY: json.dumps(parameters_of(self.request, index))}
        file = safetensors.torch.save(tensors, metadata)
        return EncodedTrajectory(SAFETENSORS_MEDIA_TYPE, tensors=file)

    def _copied(self, rows: torch.Tensor) -> torch.Tensor:
        # DiT has its scheduler step the rows without a class as well, behind the others.
        return rows[: self.request.n].detach().to("cpu", copy=True)


class ImageTrajectory(Trajectory):
    """Decodes each step when it has been done, as previews are decoded."""

    def __init__(
        self, request: GenerationRequest, wanted: TrajectoryRequest, room: TrajectoryRoom
    ) -> None:
        super().__init__(request, wanted, room)
        self._steps: list[RecordedImages] = []

    @property
    def is_empty(self) -> bool:
        """Whether no step is recorded."""
        return not self._steps

    def step_bytes(self, seen: Denoised) -> int:
        """What the images of x_t and x_0 take."""
        return shown_step_bytes(self.request)

    def add(self, pipeline: Any, observed: Observed, seen: Denoised, step: int) -> None:
        """Decode what a step began with, and what it predicted."""
        predicted, sample = observed.predict(), seen.sample
        if is_variance_exploding(observed.scheduler):
            # Such as Euler's, which keep x_t / alpha: decoded like that it would be glaring.
            sample = sample * noise_level(observed.scheduler, seen)[0]
        recorded = RecordedImages(
            step,
            float(torch.as_tensor(seen.timestep).reshape(-1)[0]),
            self._decoded(pipeline, sample),
            None if predicted is None else self._decoded(pipeline, predicted),
        )
        self._steps.append(recorded)

    def encode(self, index: int) -> EncodedTrajectory:
        """Files of the request's output format."""
        steps = (
            TrajectoryStep(
                recorded.step,
                recorded.timestep,
                self._file(recorded.x_t, index),
                self._file(recorded.x_0, index),
            )
            for recorded in self._steps
        )
        return EncodedTrajectory(MEDIA_TYPES[self.request.output_format], steps=tuple(steps))

    def _decoded(self, pipeline: Any, rows: torch.Tensor) -> Images | None:
        return decode_latents(pipeline, self.request, rows[: self.request.n])

    def _file(self, images: Images | None, index: int) -> bytes:
        return b"" if images is None else encode_preview(images[index], self.request, index).data


def trajectory_of(request: GenerationRequest, room: TrajectoryRoom) -> Trajectory | None:
    """What will be recorded of a request, or None if it wants nothing of it."""
    wanted = request.trajectory
    if wanted is None:
        return None
    if wanted.format is TrajectoryFormat.SAFETENSORS:
        return TensorTrajectory(request, wanted, room)
    return ImageTrajectory(request, wanted, room)


class Recorder:
    """Hears of the steps of one pipeline call. Runs inside the request's greenlet.

    Args:
        pipeline: the request's own copy.
        trajectory: gets what is seen.
    """

    def __init__(self, pipeline: Any, trajectory: Trajectory) -> None:
        self._pipeline = pipeline
        self._trajectory = trajectory
        self._observed = Observed(pipeline.scheduler)

    def step_ended(self, step: int, steps: int, latents: torch.Tensor) -> None:
        """Record the step, if it is one of those that are wanted.

        Args:
            step: from 1.
            steps: in all.
            latents: what it made.

        Raises:
            InvalidRequestError: the trajectory would be too large.
            ServerFullError: there is no room for it now.
        """
        seen, trajectory = self._observed.latest, self._trajectory
        trajectory.latents = latents
        if seen is None or not trajectory.wanted.records(step):
            return
        if len(seen.sample) % trajectory.request.n:
            raise cannot_be_seen(trajectory.request)
        if trajectory.is_empty:
            trajectory.take_room(seen, steps)
        trajectory.add(self._pipeline, self._observed, seen, step)


def cannot_be_seen(request: GenerationRequest) -> InvalidRequestError:
    """The answer to a request for steps that its pipeline does not show."""
    message = f"trajectory must be left out: the steps of model {request.model!r} cannot be seen"
    return InvalidRequestError(message, "trajectory")
