from __future__ import annotations

import socket

from service.doctor import examine


def test_nobody_answers():
    with socket.socket() as taken:
        # Bound and not listened to: whoever connects is refused.
        taken.bind(("127.0.0.1", 0))
        (finding,) = examine(f"http://127.0.0.1:{taken.getsockname()[1]}")

    assert not finding.well
    assert finding.name == "reachability"
    assert "is the service started" in finding.advice
