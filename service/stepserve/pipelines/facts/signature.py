"""What a pipeline's `__call__` takes, read once when the pipeline is loaded."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from inspect import Parameter
from types import UnionType
from typing import Any

# Pipelines give these a default of None and raise when they are left out.
IMAGE_INPUTS = ("image", "mask_image", "control_image")
# Arguments that mark a pipeline for something else than images.
OTHER_MEDIA = {
    "num_frames": "videos",
    "frames": "videos",
    "video_length": "videos",
    "video": "videos",
    "control_video": "videos",
}

# What the arguments do not show, by how the names of classes begin.
OTHER_PRODUCTS = {
    "DiffusionGemma": "text",
    "LLaDA2": "text",
    "Marigold": "predictions",
    "RFD4Proteina": "proteins",
    "ShapE": "shapes",
    "StableAudio": "sound",
}


@dataclass(frozen=True)
class CallSignature:
    """The arguments of a pipeline's `__call__`.

    Args:
        names: all that may be passed by name.
        needed: those that no call can do without, `prompt` included where it is taken.
        defaults: the default of every other one.
        makes: what comes out, in the plural.
    """

    names: frozenset[str]
    needed: frozenset[str] = frozenset()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    makes: str = "images"

    def accepts(self, name: str) -> bool:
        """Whether a call that passes this argument is heard.

        What a `**kwargs` takes besides is none: pipelines leave it lying, a prompt as well.
        """
        return name in self.names

    def default(self, name: str, kind: type | UnionType) -> Any:
        """The default of an argument where it is one of that kind, else None."""
        value = self.defaults.get(name)
        return value if isinstance(value, kind) and not isinstance(value, bool) else None


def read_signature(pipeline_class: type) -> CallSignature:
    """Read the arguments of the class's `__call__`."""
    parameters = _parameters(pipeline_class)
    named = {p.name: p for p in parameters if p.kind not in _COLLECTING}
    return CallSignature(
        names=frozenset(named),
        needed=frozenset(name for name, p in named.items() if _is_needed(p)),
        defaults={n: p.default for n, p in named.items() if p.default is not Parameter.empty},
        makes=_product(pipeline_class, named),
    )


def accepted_arguments(signature: CallSignature, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the wanted arguments that the call takes.

    What belongs to an argument that is not taken goes with it.
    """
    accepted = {name: value for name, value in wanted.items() if signature.accepts(name)}
    if "callback_on_step_end" not in accepted:
        accepted.pop("callback_on_step_end_tensor_inputs", None)
    return accepted


def _parameters(pipeline_class: type) -> list[Parameter]:
    """Of the first `__call__` that does not merely pass on whatever it is given."""
    found: list[Parameter] = []
    for cls in pipeline_class.__mro__:
        call = vars(cls).get("__call__")
        if call is None:
            continue
        found = list(inspect.signature(call).parameters.values())[1:]
        if not {p.kind for p in found}.issuperset(_COLLECTING):
            break
    return found


_COLLECTING = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)


def _is_needed(parameter: Parameter) -> bool:
    if parameter.default is Parameter.empty or parameter.name == "prompt":
        return True
    if parameter.name == "image":
        # Editing pipelines that can also start from nothing say so in the annotation.
        return not _may_be_none(parameter.annotation)
    return parameter.name in IMAGE_INPUTS


def _may_be_none(annotation: Any) -> bool:
    return any(word in str(annotation) for word in ("None", "Optional"))


def _product(pipeline_class: type, names: Mapping[str, Parameter]) -> str:
    if any(name.startswith("audio") for name in names):
        return "sound"
    if "Prior" in pipeline_class.__name__:
        return "embeddings"
    name = pipeline_class.__name__
    by_class = [made for kind, made in OTHER_PRODUCTS.items() if name.startswith(kind)]
    by_argument = [media for argument, media in OTHER_MEDIA.items() if argument in names]
    return next(iter([*by_class, *by_argument]), "images")
