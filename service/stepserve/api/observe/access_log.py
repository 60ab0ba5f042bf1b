"""One log line for each HTTP exchange."""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import Any

from stepserve.api.exchange_context import Exchange

logger = logging.getLogger(__name__)

# Asked again and again by probes, by Prometheus and by open pages.
QUIET = (
    "/healthz",
    "/readyz",
    "/metrics",
    "/",
    "/playground",
    "/docs/assets",
    "/v1/models/{id}/batch",
)


class AccessLog:
    """Hears of exchanges and logs them.

    Args:
        prompts: whether to tell prompts.
    """

    def __init__(self, prompts: bool = False) -> None:
        self._prompts = prompts

    def __call__(self, exchange: Exchange) -> None:
        """Log one exchange."""
        level = _level(exchange)
        if logger.isEnabledFor(level):
            message = f"{exchange.method} {exchange.route} {exchange.status}"
            logger.log(level, message, extra={"fields": self._fields(exchange)})

    def _fields(self, exchange: Exchange) -> dict[str, Any]:
        """What is told besides the message: nothing that is empty."""
        notes = exchange.notes
        told: dict[str, Any] = {
            "request_id": exchange.request_id,
            "trace_id": exchange.trace_id,
            "method": exchange.method,
            "route": exchange.route,
            "status": exchange.status,
            "outcome": exchange.outcome,
            "model": notes.model,
            "caller": exchange.caller,
            "duration_s": round(exchange.duration_s, 6),
        }
        return {k: v for k, v in told.items() if v != ""} | self._asked(exchange) | _times(exchange)

    def _asked(self, exchange: Exchange) -> dict[str, Any]:
        asked = exchange.notes.generation
        if asked is None:
            return {}
        told = {
            "task": asked.task.value,
            "n": asked.n,
            "size": asked.final_size,
            "num_inference_steps": asked.num_inference_steps,
            "priority": asked.priority.name.lower(),
        }
        notes = exchange.notes
        if notes.prompts:
            told |= {"prompt_count": len(notes.prompts), "failed_count": len(notes.failures)}
        prompt = list(notes.prompts) or asked.prompt
        prompts = {"prompt": prompt, "negative_prompt": asked.negative_prompt}
        return told | prompts if self._prompts else told


def _times(exchange: Exchange) -> dict[str, float]:
    timings = exchange.notes.timings
    return {} if timings is None else {k: round(v, 6) for k, v in asdict(timings).items()}


def _level(exchange: Exchange) -> int:
    if exchange.status >= 500 and not exchange.notes.is_refusal:
        return logging.ERROR
    return logging.DEBUG if exchange.route in QUIET else logging.INFO
