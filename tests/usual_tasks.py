"""What a model takes that draws, varies and repaints, as most text-to-image models do."""

from stepserve.domain.tasks import ONE, OPTIONAL, Role, Task, TaskInputs

IMAGE_INPUTS: TaskInputs = {Role.PROMPT: OPTIONAL, Role.IMAGE: ONE, Role.STRENGTH: OPTIONAL}
USUAL_TASKS: dict[Task, TaskInputs] = {
    Task.TEXT_TO_IMAGE: {Role.PROMPT: ONE, Role.HIRES: OPTIONAL},
    Task.IMAGE_TO_IMAGE: IMAGE_INPUTS,
    Task.INPAINTING: {**IMAGE_INPUTS, Role.MASK: ONE},
}
