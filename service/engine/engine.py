"""The engine: one thread that batches, and a door that other threads may knock on."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from service.domain.errors import CancelledError, NotReadyError
from service.engine.admission import Load, check_room
from service.engine.batcher import Batcher, Counters
from service.engine.cost import CostModel
from service.engine.track import Track, Work

logger = logging.getLogger(__name__)

IDLE_WAIT_S = 0.5
DRAIN_RETRY_S = 5.0


@dataclass(frozen=True)
class EngineOptions:
    """Limits and manners of one engine.

    Args:
        max_rows: most rows of one shared denoiser forward.
        max_waiting_pictures: pictures in hand beyond which new requests are refused.
        threads: torch threads of the engine, or None for torch's default.
        niceness: how far the engine thread steps back behind the threads that answer HTTP.
    """

    max_rows: int = 32
    max_waiting_pictures: int = 64
    threads: int | None = None
    niceness: int = 0


class Engine:
    """Runs submitted work. Every accepted piece of work ends in exactly one listener call."""

    def __init__(self, options: EngineOptions | None = None, cost: CostModel | None = None) -> None:
        self.options = options or EngineOptions()
        self.batcher = Batcher(self.options.max_rows, cost, on_ended=self._forget)
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        # Guarded by the lock: what submitting threads and the engine thread share.
        self._lock = threading.Lock()
        self._in_hand: dict[str, Work] = {}
        self._open = True
        self._running = True
        # Written by the engine thread only.
        self._backlog_s = 0.0
        self._last_sign_of_life_s = time.monotonic()

    def start(self) -> None:
        """Start the engine thread."""
        self._thread.start()

    def submit(self, work: Work) -> int:
        """Accept work and return how many requests are ahead of it.

        Raises:
            ServerFullError: too many pictures are in hand already.
            NotReadyError: the engine is draining.
        """
        with self._lock:
            if not self._open:
                raise NotReadyError("the server is draining and takes no new work", DRAIN_RETRY_S)
            load = self._load()
            check_room(load, work.pictures, self.options.max_waiting_pictures)
            self._in_hand[work.id] = work
        track = Track(work, self.batcher.clock())
        self._commands.put(lambda: self.batcher.add(track))
        return load.requests

    def cancel(self, request_id: str) -> None:
        """End a request at its next park; does nothing if it ended already."""
        error = CancelledError(f"request {request_id} was cancelled")
        self._commands.put(lambda: self.batcher.stop_track(request_id, error))

    def load(self) -> Load:
        """Work in hand: everything accepted and not yet ended."""
        with self._lock:
            return self._load()

    @property
    def counters(self) -> Counters:
        """Totals since the start."""
        return self.batcher.counters

    def silent_s(self) -> float:
        """Seconds since the engine thread last showed a sign of life: infinite if it ended."""
        if not self._thread.is_alive():
            return float("inf")
        return time.monotonic() - self._last_sign_of_life_s

    def stop(self, drain_s: float = 0.0) -> None:
        """Take no new work, finish what is in hand within `drain_s`, cancel the rest, end."""
        with self._lock:
            self._open = False
        deadline_s = time.monotonic() + drain_s
        while self.load().requests and time.monotonic() < deadline_s:
            time.sleep(0.01)
        for request_id in list(self._in_hand):
            self.cancel(request_id)
        self._commands.put(self._end)
        self._thread.join()

    def _main(self) -> None:
        if self.options.niceness:
            # On Linux niceness belongs to a thread, and threads it starts (OpenMP's) inherit it.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), self.options.niceness)
        if self.options.threads is not None:
            torch.set_num_threads(self.options.threads)
        # Grad mode belongs to the thread, not to the greenlet: once, at the root.
        torch.set_grad_enabled(False)
        while self._running:
            self._take_commands(wait=False)
            worked = self.batcher.tick()
            self._backlog_s = self.batcher.backlog_s()
            self._last_sign_of_life_s = time.monotonic()
            if not worked:
                self._take_commands(wait=True)

    def _take_commands(self, wait: bool) -> None:
        with contextlib.suppress(queue.Empty):
            if wait:
                self._commands.get(timeout=IDLE_WAIT_S)()
            while True:
                self._commands.get_nowait()()

    def _end(self) -> None:
        self._running = False

    def _forget(self, track: Track) -> None:
        with self._lock:
            self._in_hand.pop(track.work.id, None)

    def _load(self) -> Load:
        pictures = sum(work.pictures for work in self._in_hand.values())
        return Load(len(self._in_hand), pictures, self._backlog_s)
