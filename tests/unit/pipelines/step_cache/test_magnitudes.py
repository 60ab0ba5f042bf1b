from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stepserve.pipelines.step_cache.magnitudes import (
    FILE,
    Calibration,
    MagnitudesError,
    digest_of,
    read_magnitudes,
    write_magnitudes,
)

CALIBRATION = Calibration((1.0, 1.25, 0.5), "DDIMScheduler", 3, 4.0, "64x64", 2, "0.1.0")


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = write_magnitudes(tmp_path, CALIBRATION)

    assert path == tmp_path / FILE
    assert read_magnitudes(tmp_path) == CALIBRATION.magnitudes
    assert json.loads(path.read_text())["scheduler"] == "DDIMScheduler"


def test_it_is_written_anew(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("{")
    write_magnitudes(tmp_path, CALIBRATION)

    assert read_magnitudes(tmp_path) == CALIBRATION.magnitudes
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_model_without_the_file_has_none(tmp_path: Path) -> None:
    assert read_magnitudes(tmp_path) == ()


def test_magnitudes_are_all_that_is_needed(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"magnitudes": [1, 2.5]}')
    assert read_magnitudes(tmp_path) == (1.0, 2.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("\ud800".encode("utf-8", "surrogatepass"), "is not valid JSON"),
        ("[1, 2]", "must hold 'magnitudes', a list of 2 to 1000 numbers"),
        ('{"magnitude": [1, 2]}', "must hold 'magnitudes', a list of 2 to 1000 numbers"),
        ('{"magnitudes": "1, 2"}', "must hold 'magnitudes', a list of 2 to 1000 numbers"),
        ('{"magnitudes": [1]}', "must hold 'magnitudes', a list of 2 to 1000 numbers"),
        (json.dumps({"magnitudes": [1] * 1001}), "a list of 2 to 1000 numbers"),
        ('{"magnitudes": [1, 0]}', "has 0 at magnitudes[1], which must be over 0"),
        ('{"magnitudes": [1, -2.5]}', "has -2.5 at magnitudes[1], which must be over 0"),
        ('{"magnitudes": [NaN, 1]}', "has nan at magnitudes[0], which must be over 0"),
        ('{"magnitudes": [1, Infinity]}', "has inf at magnitudes[1], which must be over 0"),
        ('{"magnitudes": [1, true]}', "has True at magnitudes[1], which must be over 0"),
        ('{"magnitudes": [1, "2"]}', "has '2' at magnitudes[1], which must be over 0"),
    ],
)
def test_what_is_wrong_is_told_with_what_to_do(
    tmp_path: Path, text: str | bytes, message: str
) -> None:
    (tmp_path / FILE).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(MagnitudesError) as wrong:
        read_magnitudes(tmp_path)

    told = str(wrong.value)
    assert str(tmp_path / FILE) in told
    assert message in told
    assert told.endswith("measure it again with `stepserve calibrate`, or delete it")


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    with pytest.raises(MagnitudesError, match="cannot be read: Is a directory"):
        read_magnitudes(tmp_path)


@given(st.lists(st.floats(0.01, 100), min_size=1), st.data())
def test_other_magnitudes_have_another_digest(magnitudes: list[float], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(magnitudes) - 1))
    changed = [value + 0.5 * (i == place) for i, value in enumerate(magnitudes)]

    assert len(digest_of(magnitudes)) == 64
    assert digest_of(magnitudes) == digest_of(tuple(magnitudes))
    assert digest_of(changed) != digest_of(magnitudes)
    assert digest_of(()) == ""
