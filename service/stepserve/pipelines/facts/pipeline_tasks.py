"""The one table of what pipelines do: which tasks, and which argument of a call carries which role.

Most can be read off the signature of a class. `ROWS` says what cannot.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from stepserve.domain.tasks import MAX_IMAGES, ONE, OPTIONAL, Count, Role, Task, TaskInputs
from stepserve.pipelines.facts.signature import CallSignature

ARGUMENTS: Mapping[Role, tuple[str, ...]] = MappingProxyType(
    {
        Role.PROMPT: ("prompt",),
        Role.CLASS_LABEL: ("class_labels",),
        Role.IMAGE: ("image", "images", "input_images"),
        Role.MASK: ("mask_image", "mask"),
        Role.STRENGTH: ("strength",),
        Role.IMAGE_GUIDANCE: ("image_guidance_scale", "img_guidance_scale"),
        Role.NOISE_LEVEL: ("noise_level",),
        Role.CONTROL: ("control_image",),
    }
)
"""What pipelines call an input, the likeliest name first."""


@dataclass(frozen=True)
class Row:
    """What the signature of some classes does not say.

    Args:
        classes: a pattern of their names.
        tasks: what they do; empty: what their signature shows.
        images: how many images a task takes that starts from images.
        left_out: roles whose argument is of no use to callers.
        arguments: by role, where the argument has another name than in `ARGUMENTS`.
        is_fitted: whether images are resized before the call to what the size that is asked for
            needs. None: those of image-to-image and inpainting are.
        looks_at_all: whether the prompt means every image of a list, although a strength is taken.
        second_image: what the call takes a second image as, where it takes no list of them.
        prompt: the form of one, where the call takes no other.
        chooses_size: whether the call makes an image of about a million pixels in the shape of the
            first image, whatever size is asked for.
    """

    classes: str
    tasks: tuple[Task, ...] = ()
    images: Count = ONE
    left_out: frozenset[Role] = frozenset()
    arguments: Mapping[Role, str] = field(default_factory=dict)
    is_fitted: bool | None = None
    looks_at_all: bool = False
    second_image: str = ""
    prompt: str = "{}"
    chooses_size: bool = False


SECOND_IMAGE = "image_reference"
IN_JSON = '{{"edit_instruction": "{}"}}'

ROWS = (
    # A ControlNet's image is a control, whatever the argument is called.
    Row(r".*(ControlNet|Adapter)(PAG)?Pipeline", arguments={Role.CONTROL: "image"}),
    Row(r".*InstructPix2PixPipeline", (Task.EDIT,), is_fitted=True),
    Row(r".*(Upscale|SuperResolution)Pipeline", (Task.UPSCALING,), is_fitted=True),
    # The whole schedule is its default, and what it was trained for.
    Row(r"FluxFillPipeline", left_out=frozenset({Role.STRENGTH})),
    Row(r"Flux2(Klein(KV)?)?Pipeline", images=Count(1, 10)),
    Row(r"(FluxKontext|Flux2Klein)InpaintPipeline", images=Count(1, 2), second_image=SECOND_IMAGE),
    Row(
        r"QwenImageEditInpaintPipeline",
        is_fitted=False,
        looks_at_all=True,
        chooses_size=True,
    ),
    Row(r"BriaFibo2Pipeline", images=Count(1, 5)),
    Row(r"BriaFiboEditPipeline", (Task.EDIT,), images=Count(1, MAX_IMAGES), prompt=IN_JSON),
    Row(
        r"(QwenImage(EditPlus|21)|OmniGen|JoyImageEditPlus|ZImageOmni)Pipeline",
        images=Count(1, MAX_IMAGES),
    ),
)
WITH_MASK: Mapping[str, str] = MappingProxyType(
    {
        "FluxKontextPipeline": "FluxKontextInpaintPipeline",
        "Flux2KleinPipeline": "Flux2KleinInpaintPipeline",
    }
)
"""Which class repaints with the modules of another, where diffusers' own table does not say."""

_AS_SIGNED = Row("")


@dataclass(frozen=True)
class PipelineTask:
    """One task as the pipelines of one class do it.

    Args:
        task: which one.
        inputs: how many of each role it takes.
        arguments: by role, what the call takes them as.
        is_fitted: whether images are resized to the size that is asked for before the call.
        has_one_each: whether a call that makes several images is given the image for each, so that
            each is encoded with noise of its own seed.
        second_image: what the call takes a second image as; empty: several are a list.
        prompt: the form of one.
        chooses_size: whether the image decides the size, whatever is asked for.
    """

    task: Task
    inputs: TaskInputs
    arguments: Mapping[Role, str]
    is_fitted: bool
    has_one_each: bool
    second_image: str = ""
    prompt: str = "{}"
    chooses_size: bool = False


def pipeline_tasks(class_name: str, signature: CallSignature) -> tuple[PipelineTask, ...]:
    """What pipelines of a class do, their own task first; empty where that is unknown to us.

    Args:
        class_name: without its module.
        signature: of the class's `__call__`.
    """
    if signature.makes != "images":
        return ()
    row = _row_of(class_name)
    arguments = _arguments(row, signature)
    if signature.needed - set(arguments.values()):
        return ()
    tasks = row.tasks or tuple(_signed_tasks(arguments, signature))
    return tuple(_as_done(task, row, arguments, signature) for task in tasks)


def told_classes(done: PipelineTask, count: int) -> PipelineTask:
    """A task as it is done with a denoiser of so many classes.

    A class is required where there are any: pipelines would choose one at random. Where there are
    none they would ignore it.
    """
    if Role.CLASS_LABEL not in done.inputs:
        return done
    if count:
        return replace(done, inputs={**done.inputs, Role.CLASS_LABEL: ONE})
    return replace(
        done,
        task=Task.UNCONDITIONAL if done.task is Task.CLASS_TO_IMAGE else done.task,
        inputs={r: n for r, n in done.inputs.items() if r is not Role.CLASS_LABEL},
        arguments={r: name for r, name in done.arguments.items() if r is not Role.CLASS_LABEL},
    )


def unknown_needs(class_name: str, signature: CallSignature) -> list[str]:
    """Arguments that a call of the class needs and no request can give, sorted."""
    row = _row_of(class_name)
    return sorted(signature.needed - set(_arguments(row, signature).values()))


def _row_of(class_name: str) -> Row:
    return next((row for row in ROWS if re.fullmatch(row.classes, class_name)), _AS_SIGNED)


def _arguments(row: Row, signature: CallSignature) -> dict[Role, str]:
    named = {
        role: next((name for name in names if signature.accepts(name)), "")
        for role, names in ARGUMENTS.items()
        if role not in row.left_out
    }
    otherwise = {role: name for role, name in row.arguments.items() if not named.get(role)}
    # An argument has one role.
    taken = set(otherwise.values())
    return {role: name for role, name in named.items() if name and name not in taken} | otherwise


def _signed_tasks(arguments: Mapping[Role, str], signature: CallSignature) -> Iterator[Task]:
    image, mask = arguments.get(Role.IMAGE), arguments.get(Role.MASK)
    if not {image, mask} & signature.needed and (image is None or Role.PROMPT in arguments):
        yield _from_nothing(arguments)
    if image is not None:
        yield _from_images(arguments, signature)


def _from_nothing(arguments: Mapping[Role, str]) -> Task:
    if Role.PROMPT in arguments:
        return Task.TEXT_TO_IMAGE
    return Task.CLASS_TO_IMAGE if Role.CLASS_LABEL in arguments else Task.UNCONDITIONAL


def _from_images(arguments: Mapping[Role, str], signature: CallSignature) -> Task:
    if arguments.get(Role.MASK) in signature.needed:
        return Task.INPAINTING
    return Task.IMAGE_TO_IMAGE if Role.STRENGTH in arguments else Task.EDIT


def _as_done(
    task: Task, row: Row, arguments: Mapping[Role, str], signature: CallSignature
) -> PipelineTask:
    counted = ((role, _count(role, task, row, arguments, signature)) for role in arguments)
    inputs = {role: count for role, count in counted if count.most}
    is_noisy = task in (Task.IMAGE_TO_IMAGE, Task.INPAINTING)
    return PipelineTask(
        task,
        inputs,
        {role: arguments[role] for role in inputs},
        is_noisy if row.is_fitted is None else row.is_fitted,
        is_noisy and not row.looks_at_all,
        row.second_image,
        row.prompt,
        row.chooses_size,
    )


FROM_NOTHING = (Task.TEXT_TO_IMAGE, Task.CLASS_TO_IMAGE, Task.UNCONDITIONAL)
OF_IMAGES = (Role.IMAGE, Role.MASK, Role.STRENGTH, Role.IMAGE_GUIDANCE, Role.NOISE_LEVEL)
"""Roles that say nothing without an image to start from."""


def _count(
    role: Role, task: Task, row: Row, arguments: Mapping[Role, str], signature: CallSignature
) -> Count:
    is_needed = arguments[role] in signature.needed
    if role in OF_IMAGES and task in FROM_NOTHING:
        return Count(0, 0)
    match role:
        case Role.PROMPT:
            # A variation has no prompt.
            return OPTIONAL if task in (Task.IMAGE_TO_IMAGE, Task.UPSCALING) else ONE
        case Role.IMAGE:
            return row.images
        case _:
            return ONE if is_needed else OPTIONAL


def offered_inputs(tasks: Mapping[Task, PipelineTask]) -> dict[Task, TaskInputs]:
    """The inputs of each task, for a model's capabilities."""
    return with_hires({task: done.inputs for task, done in tasks.items()})


def with_hires(tasks: Mapping[Task, TaskInputs]) -> dict[Task, TaskInputs]:
    """The same, where images from a prompt are enlarged if the model also starts from images."""
    drawn = tasks.get(Task.TEXT_TO_IMAGE)
    if drawn is None:
        return dict(tasks)
    others = {role: count for role, count in drawn.items() if role is not Role.HIRES}
    refines = Role.STRENGTH in tasks.get(Task.IMAGE_TO_IMAGE, {})
    return {**tasks, Task.TEXT_TO_IMAGE: others | ({Role.HIRES: OPTIONAL} if refines else {})}
