"""Whether a served model takes requests now."""

from __future__ import annotations

from dataclasses import dataclass

from stepserve.domain.models import ModelCapabilities, SizeRange


@dataclass(frozen=True)
class ModelStatus:
    """One served model, and whether it takes requests now; `detail` says why where it does not."""

    capabilities: ModelCapabilities
    ready: bool
    detail: str = ""

    @property
    def is_known(self) -> bool:
        """Whether its limits are: they are read off the model when it is loaded."""
        return bool(self.capabilities.schedulers)


def unknown_status(model_id: str, detail: str, aliases: tuple[str, ...] = ()) -> ModelStatus:
    """Of a model whose limits are not known, as it is not loaded."""
    capabilities = ModelCapabilities(
        id=model_id,
        description=detail,
        sizes=SizeRange(0, 0, 1, 0),
        schedulers=(),
        default_scheduler="",
        aliases=aliases,
    )
    return ModelStatus(capabilities, ready=False, detail=detail)
