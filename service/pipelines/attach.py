"""Which modules of a pipeline park their caller: one row a case, no code per pipeline."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from service.engine.memo import Memo
from service.engine.parking import make_parkable
from service.engine.track import Stage

PROMPTS_BYTES = 64 * 2**20


@dataclass(frozen=True)
class ParkingRule:
    """One method of one pipeline component whose calls may be shared.

    Args:
        ignored: keyword arguments that do not influence the result. The VAE takes a `generator`
            in `decode` and never draws from it.
        max_rows: where it should be less than the engine's row limit. Text encoders and the VAE
            run one call at a time: they take a few percent of the time and gain little from
            sharing, while on many processors their kernels round differently for another row
            count, and the picture would no longer be the one that diffusers makes alone.
        remembered_bytes: how much is kept of outputs, for calls with equal arguments. Most
            requests have the same negative prompt, and people try a prompt again and again.
    """

    component: str
    method: str
    stage: Stage
    ignored: frozenset[str] = frozenset()
    max_rows: int | None = None
    remembered_bytes: int = 0


PARKING_RULES = (
    ParkingRule(
        "text_encoder", "forward", Stage.ENCODE, max_rows=1, remembered_bytes=PROMPTS_BYTES
    ),
    ParkingRule(
        "text_encoder_2", "forward", Stage.ENCODE, max_rows=1, remembered_bytes=PROMPTS_BYTES
    ),
    ParkingRule("unet", "forward", Stage.DENOISE),
    ParkingRule("transformer", "forward", Stage.DENOISE),
    ParkingRule("vae", "encode", Stage.ENCODE, max_rows=1),
    ParkingRule("vae", "decode", Stage.DECODE, ignored=frozenset({"generator"}), max_rows=1),
)


def attach(
    pipeline: Any,
    max_rows: int,
    enter: Mapping[str, Callable[[Hashable], None]] | None = None,
) -> Callable[[], None]:
    """Make the heavy modules of `pipeline` park every track that calls them.

    The modules stay resident and shared; called outside a track they behave as before.

    Args:
        pipeline: the resident pipeline.
        max_rows: most rows of one shared forward.
        enter: by component, what sets it to a variant before a forward of calls that want it.

    Returns:
        A function that undoes it.
    """
    undo = []
    for rule in PARKING_RULES:
        module = getattr(pipeline, rule.component, None)
        if module is not None:
            undo.append(
                make_parkable(
                    module,
                    rule.component,
                    rule.method,
                    stage=rule.stage,
                    ignored=rule.ignored,
                    max_rows=min(rule.max_rows or max_rows, max_rows),
                    enter=(enter or {}).get(rule.component),
                    memo=Memo(rule.remembered_bytes) if rule.remembered_bytes else None,
                )
            )

    def detach() -> None:
        for restore in undo:
            restore()

    return detach
