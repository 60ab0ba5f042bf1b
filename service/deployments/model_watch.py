"""What an ingress replica knows of the models: which there are, whether each answers, what it can.

Models come and go while the service runs, each as an application of its own. The ingress asks Ray
Serve which there are, and each model how it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from service.api.backend import ModelStatus
from service.domain.models import ModelCapabilities, SizeRange

PROBE_INTERVAL_S = 1.0
LOADING_INTERVAL_S = 0.2
PROBE_TIMEOUT_S = 10.0
FIRST_LOOK_TIMEOUT_S = 1.0
# A busy machine may be slow to answer, and a lost replica takes some seconds to replace.
SILENCE_S = 15.0
LOADING = "loading"


@dataclass(frozen=True)
class Listed:
    """A model as Ray Serve lists it.

    Args:
        failure: why it gave the model up; empty where it did not.
        asleep: whether it was scaled down to no replica, which the next request undoes.
    """

    failure: str = ""
    asleep: bool = False


List = Callable[[], Awaitable[Mapping[str, Listed]]]
Ask = Callable[[str], Awaitable[ModelStatus | None]]


class ModelWatch:
    """Keeps the latest status of every model.

    Args:
        list_models: which models there are.
        ask: asks a model, by its id, how it is; None while no replica of it is there to answer. It
            must not wait for one: that would wake a model that sleeps.
    """

    def __init__(self, list_models: List, ask: Ask) -> None:
        self._list_models = list_models
        self._ask = ask
        self._listed: dict[str, Listed] = {}
        self._statuses: dict[str, ModelStatus] = {}
        self._answered: dict[str, asyncio.Event] = {}
        self._heard_s: dict[str, float] = {}
        self._watching: dict[str, asyncio.Task[None]] = {}
        self._listing: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to ask, and wait briefly: who is there already is known before anybody calls."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._look(), FIRST_LOOK_TIMEOUT_S)
        self._listing = asyncio.create_task(self._look_for_ever())
        await asyncio.gather(*map(self.status, list(self._watching)))

    def statuses(self) -> list[ModelStatus]:
        """The latest status of every model."""
        return list(self._statuses.values())

    async def status(self, model_id: str) -> ModelStatus | None:
        """The latest status of one model, after a brief wait if it has never answered.

        A model may be ready for moments before every ingress replica knows. None: no such model.
        """
        answered = self._answered.get(model_id)
        if answered is not None and not answered.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(answered.wait(), FIRST_LOOK_TIMEOUT_S)
        return self._statuses.get(model_id)

    async def _look_for_ever(self) -> None:
        while True:
            await asyncio.sleep(PROBE_INTERVAL_S)
            with contextlib.suppress(RayError, RayServeException):
                await self._look()

    async def _look(self) -> None:
        self._listed = dict(await self._list_models())
        for model_id in set(self._watching) - set(self._listed):
            self._watching.pop(model_id).cancel()
            del self._statuses[model_id], self._answered[model_id]
        for model_id in self._listed:
            if model_id not in self._watching:
                self._statuses[model_id] = unknown_status(model_id, LOADING)
                self._answered[model_id] = asyncio.Event()
                self._watching[model_id] = asyncio.create_task(self._watch(model_id))

    async def _watch(self, model_id: str) -> None:
        while True:
            listed = self._listed[model_id]
            if listed.failure:
                self._note(model_id, ready=False, detail=listed.failure)
            elif listed.asleep:
                # Not asked: it would wake up.
                known = self._statuses[model_id]
                self._note(model_id, ready=known.is_known, detail=_asleep(known))
            elif not await self._answers(model_id):
                await asyncio.sleep(LOADING_INTERVAL_S)
                continue
            await asyncio.sleep(PROBE_INTERVAL_S)

    async def _answers(self, model_id: str) -> bool:
        """Whether there is anybody who answers."""
        try:
            status = await asyncio.wait_for(self._ask(model_id), PROBE_TIMEOUT_S)
        except (TimeoutError, RayError, RayServeException):
            status = None
        if status is None:
            self._note_silence(model_id)
            return False
        self._statuses[model_id] = status
        self._heard_s[model_id] = time.monotonic()
        self._answered[model_id].set()
        return True

    def _note_silence(self, model_id: str) -> None:
        """Requests wait for one that wakes up, and for a replica that takes a lost one's place."""
        known = self._statuses[model_id]
        if known.ready and known.detail:
            self._note(model_id, ready=True, detail="waking up")
        elif not known.ready or time.monotonic() - self._heard_s[model_id] > SILENCE_S:
            self._note(model_id, ready=False, detail=LOADING)

    def _note(self, model_id: str, ready: bool, detail: str) -> None:
        known = self._statuses[model_id].capabilities
        self._statuses[model_id] = ModelStatus(known, ready, detail)
        if detail != LOADING:
            self._answered[model_id].set()


def _asleep(status: ModelStatus) -> str:
    load_s = status.capabilities.load_s
    return "asleep" if load_s is None else f"asleep: the next request waits {load_s:.0f} s for it"


def unknown_status(model_id: str, detail: str) -> ModelStatus:
    """Of a model whose limits are not known, as it is not loaded."""
    capabilities = ModelCapabilities(
        id=model_id,
        description=detail,
        sizes=SizeRange(0, 0, 1, 0),
        schedulers=(),
        default_scheduler="",
    )
    return ModelStatus(capabilities, ready=False, detail=detail)
