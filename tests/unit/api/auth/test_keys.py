"""API keys: made, kept as hashes, read from files and lists, and found again."""

from __future__ import annotations

import hashlib
import pickle
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from stepserve.api.auth.keys import (
    ANYBODY,
    PREFIX,
    ApiKey,
    KeyRing,
    KeysUnreadableError,
    add_key,
    caller_of_key,
    hash_key,
    new_key,
    read_keys,
)
from stepserve.domain.errors import InvalidRequestError
from stepserve.domain.requests import Priority

SHA = "0" * 64
OWN_KEY = "an-operators-own-key-of-some-length"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


def test_a_new_key_is_256_random_bits_and_only_its_hash_is_kept():
    keys = {new_key() for _ in range(100)}

    assert len(keys) == 100
    assert all(key.startswith(PREFIX) and len(key) == len(PREFIX) + 43 for key in keys)
    key = keys.pop()
    assert hash_key(key) == hashlib.sha256(key.encode()).hexdigest()


def test_each_of_several_keys_is_found():
    keys = [new_key() for _ in range(3)]
    ring = KeyRing(ApiKey(name=f"k{i}", sha256=hash_key(key)) for i, key in enumerate(keys))

    assert [found.name for key in keys if (found := ring.find(key))] == ["k0", "k1", "k2"]


@given(st.text())
def test_no_other_text_is_a_key(token: str):
    key = new_key()
    ring = KeyRing([ApiKey(name="a", sha256=hash_key(key))])

    assert ring.find(token) is None
    assert ring.find(hash_key(key)) is None
    assert ring.find(key + "\ud800") is None


def test_a_ring_crosses_processes():
    ring = KeyRing([ApiKey(name="a", sha256=SHA, requests_per_minute=2)])

    assert pickle.loads(pickle.dumps(ring)).keys == ring.keys


def test_a_file_is_made_for_its_owner_alone_and_grows(file: Path):
    first, second = new_key(), new_key()
    add_key(file, ApiKey(name="app", sha256=hash_key(first), requests_per_minute=30))
    add_key(file, ApiKey(name="jobs", sha256=hash_key(second), priority="batch", max_concurrent=2))
    ring = read_keys(file, None)

    assert file.stat().st_mode & 0o777 == 0o600
    assert [key.name for key in ring.keys] == ["app", "jobs"]
    assert ring.find(first) == ring.keys[0]
    assert (ring.keys[0].requests_per_minute, ring.keys[0].max_concurrent) == (30, None)
    assert (ring.keys[1].max_concurrent, ring.keys[1].priority) == (2, "batch")
    assert first not in file.read_text()
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "keys:\n",
        "keys: []\n",
        f"keys: [{{name: a, sha256: '{SHA}'}}]\n",
        f"# ours\nkeys:\n- name: a\n  sha256: '{SHA}'",
        f"keys:\n  - name: a\n    sha256: '{SHA}'\n",
    ],
)
def test_a_key_is_added_to_a_file_however_that_is_written(file: Path, text: str):
    file.write_text(text)
    before = read_keys(file, None).keys
    added = ApiKey(name="b", sha256="1" * 64)
    add_key(file, added)

    assert read_keys(file, None).keys == (*before, added)


def test_comments_and_permissions_are_kept(file: Path):
    file.write_text(f"# for the web shop\nkeys:\n- name: a\n  sha256: '{SHA}' # until May\n")
    file.chmod(0o640)
    add_key(file, ApiKey(name="b", sha256="1" * 64))

    assert "# for the web shop" in file.read_text()
    assert "# until May" in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o640


def _add(job: tuple[Path, int]) -> None:
    file, number = job
    add_key(file, ApiKey(name=f"k{number}", sha256=f"{number:064x}"))


def test_two_that_add_a_key_at_once_lose_none(file: Path):
    # As of two processes: each opens the file, and the lock belongs to what was opened.
    with ThreadPool(4) as pool:
        pool.map(_add, [(file, number) for number in range(12)], chunksize=1)

    assert {key.name for key in read_keys(file, None).keys} == {f"k{n}" for n in range(12)}


def test_a_name_cannot_be_taken_twice(file: Path):
    add_key(file, ApiKey(name="app", sha256=SHA))
    before = file.read_text()
    with pytest.raises(KeysUnreadableError, match="two API keys are named 'app'"):
        add_key(file, ApiKey(name="app", sha256="1" * 64))

    assert file.read_text() == before


def test_one_key_cannot_have_two_names():
    with pytest.raises(KeysUnreadableError, match="'a' and 'b' are the same"):
        read_keys(None, f"a={OWN_KEY},b={OWN_KEY}")


def test_where_no_file_can_be_written(tmp_path: Path):
    with pytest.raises(KeysUnreadableError, match="cannot write API keys to"):
        add_key(tmp_path / "missing/keys.yaml", ApiKey(name="a", sha256=SHA))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("keys: [{name: a}]", "keys.0.sha256: Field required"),
        ("keys: [{name: a/b, sha256: x}]", "keys.0.name: String should match"),
        (f"keys: [{{name: a, sha256: '{SHA}', limit: 2}}]", "keys.0.limit: Extra inputs"),
        (f"keys: [{{name: a, sha256: '{SHA}', max_concurrent: 0}}]", "greater than or equal to 1"),
        (f"keys: [{{name: a, sha256: '{SHA}', requests_per_minute: .inf}}]", "a finite number"),
        (f"keys: [{{name: a, sha256: '{SHA}', priority: urgent}}]", "'interactive', 'normal' or"),
        ("[", "cannot read API keys from"),
        ("- a", "wrong API keys in"),
    ],
)
def test_a_wrong_file_is_told(file: Path, content: str, problem: str):
    file.write_text(content)
    with pytest.raises(KeysUnreadableError) as wrong:
        read_keys(file, None)

    assert problem in wrong.value.message
    assert str(file) in wrong.value.message


def test_a_file_that_others_may_write_to_is_refused(file: Path):
    """They could add keys of their own."""
    file.write_text("keys: []")
    file.chmod(0o666)
    with pytest.raises(KeysUnreadableError, match="other users may write to"):
        read_keys(file, None)


def test_a_key_is_added_through_no_link_and_in_no_folder_of_everybody(tmp_path: Path):
    (tmp_path / "target").write_text("keys: []\n")
    (tmp_path / "keys.yaml").symlink_to("target")
    add_key(tmp_path / "keys.yaml", ApiKey(name="a", sha256=SHA))
    assert (tmp_path / "target").read_text() == "keys: []\n"
    assert not (tmp_path / "keys.yaml").is_symlink()

    tmp_path.chmod(0o777)
    with pytest.raises(KeysUnreadableError, match="other users may write to"):
        add_key(tmp_path / "keys.yaml", ApiKey(name="b", sha256=SHA))


def test_a_plain_key_in_place_of_its_hash_is_not_repeated(file: Path):
    file.write_text(yaml.safe_dump({"keys": [{"name": "a", "sha256": OWN_KEY}]}))
    with pytest.raises(KeysUnreadableError) as wrong:
        read_keys(file, None)

    assert OWN_KEY not in wrong.value.message


def test_a_missing_file_lets_nobody_in(tmp_path: Path):
    with pytest.raises(KeysUnreadableError, match="cannot read API keys from"):
        read_keys(tmp_path / "missing.yaml", None)


def test_keys_listed_in_a_variable():
    key = new_key()
    ring = read_keys(None, f" app={OWN_KEY}, jobs=sha256:{hash_key(key)} ,")

    assert (found := ring.find(OWN_KEY)) is not None
    assert found.name == "app"
    assert (found := ring.find(key)) is not None
    assert found.name == "jobs"


def test_a_file_and_a_list_together(file: Path):
    add_key(file, ApiKey(name="a", sha256=SHA))

    assert [key.name for key in read_keys(file, f"b={OWN_KEY}").keys] == ["a", "b"]
    with pytest.raises(KeysUnreadableError, match="named 'a'"):
        read_keys(file, f"a={OWN_KEY}")


@pytest.mark.parametrize(
    ("listed", "problem"),
    [
        (OWN_KEY, "key 0 of the list must be written as name=key"),
        (f"a={OWN_KEY},=x", "key 1 of the list"),
        ("a=sha256:abc", "'a' of the list has a wrong hash"),
        ("a=letmein", "'a' of the list is 7 characters long and could be guessed"),
    ],
)
def test_a_wrong_list_is_told_without_its_keys(listed: str, problem: str):
    with pytest.raises(KeysUnreadableError) as wrong:
        read_keys(None, listed)

    assert problem in wrong.value.message
    assert OWN_KEY not in wrong.value.message
    assert "letmein" not in wrong.value.message


@pytest.mark.parametrize(
    ("most", "wanted", "given"),
    [
        ("interactive", None, Priority.NORMAL),
        ("interactive", "interactive", Priority.INTERACTIVE),
        ("normal", None, Priority.NORMAL),
        ("normal", "batch", Priority.BATCH),
        ("batch", None, Priority.BATCH),
    ],
)
def test_priorities_that_a_key_may_take(most: str, wanted: str | None, given: Priority):
    caller = caller_of_key(ApiKey.model_validate({"name": "a", "sha256": SHA, "priority": most}))

    assert caller.priority(wanted) is given


def test_a_priority_above_the_keys_is_refused():
    caller = caller_of_key(ApiKey(name="a", sha256=SHA, priority="normal"))
    with pytest.raises(InvalidRequestError, match="'interactive' is not open") as refused:
        caller.priority("interactive")

    assert refused.value.field == "priority"
    assert "the most urgent is 'normal'" in refused.value.message
    assert ANYBODY.priority("interactive") is Priority.INTERACTIVE
