from __future__ import annotations

import io
import json
import logging
import sys

import pytest
from stepserve.telemetry.log_sink import SinkHandler, log_sink
from stepserve.telemetry.logs import (
    FORMAT_VARIABLE,
    SINK_VARIABLE,
    make_formatter,
    resolved_format,
    set_up_logging,
)


@pytest.fixture(autouse=True)
def restored():
    ours = logging.getLogger("stepserve")
    before = ours.handlers, ours.level, ours.propagate
    yield
    for handler in ours.handlers:
        handler.close()
    ours.handlers, ours.level, ours.propagate = before


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def record(message: str = "hello", **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("stepserve.x", logging.INFO, "f.py", 1, message, (), None)
    made.created = 1_700_000_000.25
    made.fields = fields
    return made


def failed() -> logging.LogRecord:
    made = record()
    try:
        raise ValueError("oh\nno")
    except ValueError:
        made.exc_info = sys.exc_info()
    return made


def test_json_is_one_object_a_line():
    line = make_formatter("json").format(record("a\nb", request_id="r", duration_s=0.5))

    assert "\n" not in line
    assert json.loads(line) == {
        "time": "2023-11-14T22:13:20.250Z",
        "level": "info",
        "logger": "stepserve.x",
        "message": "a\nb",
        "request_id": "r",
        "duration_s": 0.5,
    }


def test_exceptions_stay_on_their_line():
    line = make_formatter("json").format(failed())

    assert "\n" not in line
    assert "ValueError: oh" in json.loads(line)["exception"]


def test_text_is_readable_and_coloured_on_a_terminal_only():
    plain = make_formatter("text").format(record(model="emoji", duration_s=0.123456))

    assert plain.endswith("INFO    hello  model=emoji duration_s=0.123")
    assert "\x1b[" not in plain
    assert "\x1b[2m" in make_formatter("colour").format(record(model="emoji"))
    assert "ValueError" in make_formatter("text").format(failed())


@pytest.mark.parametrize(
    ("name", "stream", "expected"),
    [
        ("auto", Terminal(), "colour"),
        ("auto", io.StringIO(), "json"),
        ("json", Terminal(), "json"),
        ("text", io.StringIO(), "text"),
    ],
)
def test_the_format_that_is_meant(name: str, stream: io.StringIO, expected: str):
    assert resolved_format(name, stream) == expected


def test_lines_reach_whoever_started_the_service():
    stream = io.StringIO()
    with log_sink(stream) as path:
        set_up_logging("auto", "info", {SINK_VARIABLE: path, FORMAT_VARIABLE: "json"})
        logger = logging.getLogger("stepserve.somewhere")
        logger.debug("too much")
        for index in range(3):
            logger.info("line", extra={"fields": {"index": index}})

    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["index"] for line in lines] == [0, 1, 2]


def test_logging_goes_on_when_nobody_reads(tmp_path):
    handler = SinkHandler(str(tmp_path / "nobody"))
    handler.emit(record())
    handler.close()


def test_without_a_service_lines_go_to_stderr(capsys: pytest.CaptureFixture[str]):
    set_up_logging("text", "info", {})
    logging.getLogger("stepserve.here").warning("look")

    assert "look" in capsys.readouterr().err
