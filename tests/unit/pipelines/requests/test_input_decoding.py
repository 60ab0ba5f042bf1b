"""Images of requests are decoded after admission, a few at a time, and off every other thread."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
from PIL import Image
from stepserve.domain.errors import CancelledError, InvalidRequestError, ServerFullError
from stepserve.domain.events import Failed, Finished
from stepserve.domain.requests import GenerationRequest, RequestKey
from stepserve.domain.tasks import Task
from stepserve.engine.loop.engine import EngineOptions
from stepserve.pipelines.loading.folders import LoadedModel
from stepserve.pipelines.requests import input_decoding
from stepserve.pipelines.requests.encoding import ImageEncoder
from stepserve.pipelines.requests.input_decoding import InputDecoder, Inputs
from stepserve.pipelines.requests.inputs import InputImages, decode_inputs
from stepserve.pipelines.serving.runner import PipelineRunner
from tiny_model import UNTRIED, Inbox, a_request

PATIENCE_S = 30


def png(color: Any = "red", mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (64, 64), color).save(buffer, "PNG")
    return buffer.getvalue()


def an_edit(name: str = "r", **changes: Any) -> GenerationRequest:
    options = {"task": Task.IMAGE_TO_IMAGE, "images": (png(),), "strength": 1.0} | changes
    return a_request(id=name, **options)


@dataclass
class Gate:
    """Decoding that waits until the test opens it, and tells how many were at it."""

    opened: threading.Event = field(default_factory=threading.Event)
    entered: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    threads: set[str] = field(default_factory=set)
    at_once: int = 0
    most: int = 0
    decoded: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, request: GenerationRequest, is_fitted: bool, factor: int) -> InputImages:
        with self.lock:
            self.at_once += 1
            self.most = max(self.most, self.at_once)
            self.threads.add(threading.current_thread().name)
            self.decoded.append(request.id)
        self.entered.release()
        assert self.opened.wait(PATIENCE_S)
        with self.lock:
            self.at_once -= 1
        return decode_inputs(request)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    monkeypatch.setattr(input_decoding, "decode_inputs", gate)
    yield gate
    gate.opened.set()


@pytest.fixture
def runners(tiny: LoadedModel) -> Iterator[Callable[..., PipelineRunner]]:
    made: list[PipelineRunner] = []

    def make(**options: Any) -> PipelineRunner:
        runner = PipelineRunner(tiny, EngineOptions(**options), sharing=UNTRIED)
        runner.start()
        made.append(runner)
        return runner

    yield make
    for runner in made:
        runner.stop()


def test_a_few_are_decoded_at_a_time_on_threads_of_their_own(
    runners: Callable[..., PipelineRunner], gate: Gate
) -> None:
    runner, inboxes = runners(), [Inbox() for _ in range(6)]
    for number, inbox in enumerate(inboxes):
        runner.submit(an_edit(str(number)), inbox)
    for _ in range(input_decoding.DECODERS):
        assert gate.entered.acquire(timeout=PATIENCE_S)
    text = Inbox()
    runner.submit(a_request(id="text"), text)
    assert isinstance(text.wait(), Finished)
    assert [inbox.kinds for inbox in inboxes] == [[]] * 6
    gate.opened.set()

    assert all(isinstance(inbox.wait(), Finished) for inbox in inboxes)
    assert all(inbox.kinds[:2] == ["Accepted", "Started"] for inbox in inboxes)
    assert gate.most == input_decoding.DECODERS
    assert all(name.startswith("decode") for name in gate.threads)


def test_what_is_refused_is_never_decoded(
    runners: Callable[..., PipelineRunner], gate: Gate
) -> None:
    runner, first, second = runners(max_pending_images=1), Inbox(), Inbox()
    runner.submit(an_edit("first"), first)
    runner.submit(an_edit("second"), second)
    refused = second.wait()
    gate.opened.set()

    assert isinstance(refused, Failed)
    assert isinstance(refused.error, ServerFullError)
    assert isinstance(first.wait(), Finished)
    assert gate.decoded == ["first"]


def test_who_leaves_while_waiting_is_not_decoded_for(
    runners: Callable[..., PipelineRunner], gate: Gate
) -> None:
    runner = runners()
    busy = [Inbox() for _ in range(input_decoding.DECODERS)]
    for number, inbox in enumerate(busy):
        runner.submit(an_edit(str(number)), inbox)
        assert gate.entered.acquire(timeout=PATIENCE_S)
    leaving = Inbox()
    runner.submit(an_edit("leaving"), leaving)
    runner.cancel(RequestKey("leaving"))
    ended = leaving.wait()
    gate.opened.set()

    assert isinstance(ended, Failed)
    assert isinstance(ended.error, CancelledError)
    assert all(isinstance(inbox.wait(), Finished) for inbox in busy)
    assert "leaving" not in gate.decoded


@pytest.mark.parametrize(
    ("changes", "field_name"),
    [
        ({"images": (png()[:60] + bytes(20),)}, "image"),
        ({"task": Task.INPAINTING, "mask": png(0, "L")}, "mask"),
        ({"task": Task.INPAINTING, "mask": b"none"}, "mask"),
    ],
)
def test_what_is_wrong_with_pixels_is_told_before_anything_else(
    runners: Callable[..., PipelineRunner], changes: dict[str, Any], field_name: str
) -> None:
    runner, inbox = runners(), Inbox()
    runner.submit(an_edit(**changes), inbox)
    outcome = inbox.wait()

    assert isinstance(outcome, Failed)
    assert isinstance(outcome.error, InvalidRequestError)
    assert outcome.error.field == field_name
    assert inbox.kinds == ["Failed"]
    assert runner.engine.load().requests == 0


def test_stopping_answers_those_that_wait_to_be_decoded(
    runners: Callable[..., PipelineRunner], gate: Gate
) -> None:
    runner, inboxes = runners(), [Inbox() for _ in range(4)]
    for number, inbox in enumerate(inboxes):
        runner.submit(an_edit(str(number)), inbox)
    stopping = threading.Thread(target=runner.stop)
    stopping.start()
    ends = [inbox.wait() for inbox in inboxes]
    gate.opened.set()
    stopping.join(PATIENCE_S)

    assert all(isinstance(end, Failed) for end in ends)
    assert not stopping.is_alive()
    assert all(inbox.kinds == ["Failed"] for inbox in inboxes)


class Engine:
    """Notes what becomes of held work."""

    def __init__(self) -> None:
        self.released: list[RequestKey] = []
        self.failed: list[tuple[RequestKey, BaseException]] = []

    def release(self, key: RequestKey) -> None:
        self.released.append(key)

    def fail(self, key: RequestKey, error: BaseException) -> None:
        self.failed.append((key, error))


def test_a_bug_in_a_decoder_ends_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(request: GenerationRequest, is_fitted: bool, factor: int) -> InputImages:
        raise MemoryError("no room")

    monkeypatch.setattr(input_decoding, "decode_inputs", broken)
    engine = Engine()
    decoder = InputDecoder(cast(Any, engine))
    decoder.submit(Inputs(an_edit("r")))
    decoder.stop()

    [(key, error)] = engine.failed
    assert key == RequestKey("r")
    assert "no room" in str(error)
    assert engine.released == []


def test_finished_images_that_wait_for_their_files_are_counted() -> None:
    encoder, gate = ImageEncoder(most_images=4), threading.Event()
    encoder.submit(3, lambda: tell_after(gate))
    encoder.check_room()
    encoder.submit(1, lambda: lambda: None)
    with pytest.raises(ServerFullError, match="4 finished images wait to be encoded"):
        encoder.check_room()
    gate.set()
    encoder.shutdown()
    encoder.check_room()


def tell_after(gate: threading.Event) -> Callable[[], None]:
    assert gate.wait(PATIENCE_S)
    return lambda: None
