"""The status of every model, as one ingress replica knows it.

Models come and go while the service runs, each as an application of its own. The ingress asks Ray
Serve which there are, and each model how it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from stepserve.domain.model_status import ModelStatus, unknown_status
from stepserve.ray_serve.applications import Listed

logger = logging.getLogger(__name__)

PROBE_INTERVAL_S = 1.0
# Listing the models costs some ten times what asking one does, and every ingress replica does it.
STEADY_LISTING_S = 5.0
LOADING_INTERVAL_S = 0.2
PROBE_TIMEOUT_S = 10.0
FIRST_LOOK_TIMEOUT_S = 1.0
# Longer than most models take to load; what is listed of one meanwhile is read after it.
WAKE_TIMEOUT_S = 30.0
# A busy machine may be slow to reply, and a lost replica takes some seconds to replace.
SILENCE_S = 15.0
LOADING = "loading"
COMPILING = "loading, and compiling, which may take minutes"


List = Callable[[], Awaitable[Mapping[str, Listed]]]
Ask = Callable[[str], Awaitable[ModelStatus | None]]


@dataclass
class Watched:
    """What is known of one model, and since when.

    Args:
        clock: seconds, monotonic.
        loading: what to say while it is loaded.
        is_settled: set once there was anything to say but that it loads.
        heard_s: when it last replied.
        detail: what it then said of itself.
    """

    listed: Listed
    status: ModelStatus
    clock: Callable[[], float]
    loading: str = LOADING
    is_settled: asyncio.Event = field(default_factory=asyncio.Event)
    heard_s: float = 0.0
    detail: str = ""

    def note(self, ready: bool, detail: str) -> None:
        """Whether it takes requests is known otherwise than from its own reply."""
        self.status = replace(self.status, ready=ready, detail=detail)
        if detail != self.loading:
            self.is_settled.set()

    def hear(self, status: ModelStatus) -> None:
        """It replied."""
        self.status = status
        self.detail = status.detail
        self.heard_s = self.clock()
        self.is_settled.set()

    def note_silence(self) -> None:
        """Requests wait for one that wakes up, and for a replica that takes a lost one's place."""
        if self.status.ready and self.status.detail:
            self.note(ready=True, detail="waking up")
        elif not self.status.ready or self.clock() - self.heard_s > SILENCE_S:
            self.note(ready=False, detail=self.listed.waiting or self.loading)


class ModelWatch:
    """Keeps the latest status of every model.

    Args:
        list_models: which models there are.
        ask: asks a model, by its id, how it is; None while no replica of it replies. It
            must not wait for one: that would wake a model that sleeps.
        wake: asks it as well, and waits for a replica, which wakes a model that sleeps.
        aliases: other names of models, by id, until they say theirs.
        clock: seconds, monotonic.
        compiled: ids of models that are compiled before they are ready.
    """

    def __init__(
        self,
        list_models: List,
        ask: Ask,
        wake: Ask,
        aliases: Mapping[str, tuple[str, ...]],
        clock: Callable[[], float] = time.monotonic,
        compiled: Collection[str] = (),
    ) -> None:
        self._aliases = aliases
        self._compiled = compiled
        self._list_models = list_models
        self._ask = ask
        self._wake = wake
        self._clock = clock
        self._watched: dict[str, Watched] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._listing: asyncio.Task[None] | None = None
        self._looking = asyncio.Lock()
        self._looked_s = -math.inf

    async def start(self) -> None:
        """Begin to ask, and wait briefly: models that are there are known before any request."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._look_again(0), FIRST_LOOK_TIMEOUT_S)
        self._listing = asyncio.create_task(self._look_for_ever())
        await asyncio.gather(*map(self.status, list(self._watched)))

    def statuses(self) -> list[ModelStatus]:
        """The latest status of every model."""
        return [watched.status for watched in self._watched.values()]

    async def status(self, model_id: str) -> ModelStatus | None:
        """The latest status of one model, after a brief wait if it has never replied.

        A model may be ready for moments before every ingress replica knows. None: no such model.
        """
        if model_id not in self._watched:
            await self._look_again(PROBE_INTERVAL_S)
        watched = self._watched.get(model_id)
        if watched is not None and not watched.is_settled.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(watched.is_settled.wait(), FIRST_LOOK_TIMEOUT_S)
            # It may be gone by now.
            watched = self._watched.get(model_id)
        return None if watched is None else watched.status

    async def _look_for_ever(self) -> None:
        while True:
            await asyncio.sleep(PROBE_INTERVAL_S)
            await self._look_again(STEADY_LISTING_S if self._is_steady() else PROBE_INTERVAL_S)

    def _is_steady(self) -> bool:
        """Whether every model takes requests, and nothing else is to be said of any."""
        statuses = self.statuses()
        return bool(statuses) and all(s.ready and not s.detail for s in statuses)

    async def _look_again(self, least_s: float) -> None:
        """Look if the last time is at least so long ago."""
        async with self._looking:
            if self._clock() - self._looked_s < least_s:
                return
            try:
                await self._look()
            except (RayError, RayServeException):
                return
            except Exception:
                # Whatever it was, models must be listed again.
                logger.exception("models cannot be listed")

    async def _look(self) -> None:
        self._looked_s = self._clock()
        found = await self._list_models()
        for model_id in set(self._watched) - set(found):
            self._tasks.pop(model_id).cancel()
            del self._watched[model_id]
        for model_id, listed in found.items():
            known = self._watched.get(model_id)
            if listed.failure and (known is None or known.listed != listed):
                logger.error("model %s %s: %s", model_id, listed.failure, listed.cause)
            if known is not None:
                known.listed = listed
                continue
            aliases = self._aliases.get(model_id, ())
            loading = COMPILING if model_id in self._compiled else LOADING
            status = unknown_status(model_id, loading, aliases)
            watched = Watched(listed, status, self._clock, loading)
            self._watched[model_id] = watched
            self._tasks[model_id] = asyncio.create_task(self._watch(model_id, watched))

    async def _watch(self, model_id: str, watched: Watched) -> None:
        while True:
            if watched.listed.failure:
                watched.note(ready=False, detail=watched.listed.failure)
                # Older replicas may have requests in flight, and need the heartbeat.
                await self._ask_once(model_id)
            elif watched.listed.asleep:
                await self._let_sleep(model_id, watched)
            elif (status := await self._ask_once(model_id)) is not None:
                watched.hear(status)
            else:
                watched.note_silence()
                await asyncio.sleep(LOADING_INTERVAL_S)
                continue
            await asyncio.sleep(PROBE_INTERVAL_S)

    async def _let_sleep(self, model_id: str, watched: Watched) -> None:
        """It is not asked, as it would wake up, unless it has never replied."""
        if watched.status.is_known:
            watched.note(ready=True, detail=_asleep(watched.status))
        elif watched.heard_s:
            # Why it cannot be loaded. Awake it would say so again.
            watched.note(ready=False, detail=watched.detail)
        else:
            # Only a loaded model knows its limits, and without them no request could wake it.
            watched.note(ready=False, detail=watched.loading)
            status = await self._reply(model_id, self._wake(model_id), WAKE_TIMEOUT_S)
            if status is not None:
                watched.hear(status)

    async def _ask_once(self, model_id: str) -> ModelStatus | None:
        return await self._reply(model_id, self._ask(model_id), PROBE_TIMEOUT_S)

    async def _reply(
        self, model_id: str, asking: Awaitable[ModelStatus | None], within_s: float
    ) -> ModelStatus | None:
        try:
            return await asyncio.wait_for(asking, within_s)
        except (TimeoutError, RayError, RayServeException):
            return None
        except Exception:
            # Whatever it was, a model that is never asked again would be loading for ever.
            logger.exception("model %s cannot be asked how it is", model_id)
            await asyncio.sleep(PROBE_INTERVAL_S)
            return None


def _asleep(status: ModelStatus) -> str:
    load_s = status.capabilities.load_s
    return "asleep" if load_s is None else f"asleep: the next request waits {load_s:.0f} s for it"
