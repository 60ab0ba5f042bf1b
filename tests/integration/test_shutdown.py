"""Ctrl-C: accepted work is finished, then the service ends with exit code 0."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

# No import by name: each conftest is its own module.
from conftest import Service  # type: ignore[import-not-found]


def test_ctrl_c_finishes_accepted_work_and_exits_with_0(tmp_path: Path) -> None:
    service = Service(tmp_path)
    service.start()
    body = {"prompt": "house", "num_inference_steps": 60}
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(
            httpx.post,
            f"{service.url}/v1/images/generations",
            json=body,
            timeout=60,
            trust_env=False,
        )
        time.sleep(0.7)
        assert not answer.done()
        started_s = time.monotonic()
        assert service.interrupt() == 0, service.log
        assert answer.result().status_code == 200, answer.result().text
    assert time.monotonic() - started_s < 30
    assert "everything accepted was answered" in service.log
