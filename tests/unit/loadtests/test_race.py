"""Who takes part in a race, and with what requests."""

from __future__ import annotations

import json

import pytest

from loadtests.load.trace import HOMOGENEOUS, MIXED
from loadtests.race import added_to, known_to, mixes, new_report, parse_options


def test_by_default_all_race_on_the_cpu() -> None:
    options = parse_options([])
    assert len(options.servers) > 6
    assert mixes(options) == (MIXED, HOMOGENEOUS)
    devices = [known_to(options)[name].environment.get("PEER_DEVICE") for name in options.servers]
    assert set(devices) == {None}


def test_on_a_gpu_each_serves_the_model_that_was_named() -> None:
    options = parse_options(["--cuda", "a-model", "--sizes", "512x512,768x768,384x384"])
    taking_part = known_to(options)
    assert options.servers == list(taking_part)
    assert {"stepserve", "fastapi-lock", "ray-batch-keyed"} <= set(taking_part)
    assert all("a-model" in entered.environment.values() for entered in taking_part.values())
    mixed, homogeneous = mixes(options)
    assert dict(mixed.sizes) == {"512x512": 0.6, "768x768": 0.2, "384x384": 0.2}
    assert homogeneous.sizes == (("512x512", 1.0),)


def test_who_is_not_made_for_a_gpu_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_options(["--cuda", "a-model", "--servers", "fastapi-lock", "bentoml"])
    assert "not made for --cuda: bentoml" in capsys.readouterr().err


def test_turns_are_added_to_a_race_of_the_same_kind_only() -> None:
    options = parse_options(["--requests", "8"])
    before = json.loads(json.dumps(new_report(options))) | {
        "command": "before",
        "servers": {"stepserve": {"turns": [{}]}},
        "unloaded": {"64x64": 1.0},
    }
    both = added_to(before, new_report(options))
    assert both["servers"] == before["servers"]
    assert both["unloaded"] == before["unloaded"]
    assert both["command"].startswith("before\npython -m loadtests.race")
    with pytest.raises(SystemExit, match="requests: the race so far has 8, not 9"):
        added_to(before, new_report(parse_options(["--requests", "9"])))
