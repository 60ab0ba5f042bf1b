"""The command line as a user types it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import stepserve
from PIL import Image
from safetensors.torch import load_file, save_file
from stepserve.models.catalogue import EMBEDDED
from stepserve.pipelines.step_cache.magnitudes import FILE as MAGNITUDES
from stepserve.pipelines.step_cache.magnitudes import read_magnitudes
from stepserve.pipelines.step_cache.schedule import skipped_calls

# numpy's word to torch, by way of diffusers' schedulers.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")


def in_a_process(*arguments: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stepserve.cli", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert result.returncode == expect, result.stderr
    return result


def test_generate_writes_an_image_with_its_parameters(tmp_path: Path) -> None:
    target = tmp_path / "heart.png"
    given = ("-o", str(target), "--seed", "3", "--steps", "6")
    result = in_a_process("generate", "a red heart", *given)
    assert "seed 3" in result.stdout
    assert "denoising" in result.stderr, "there should be a progress bar"
    with Image.open(target) as image:
        assert image.size == (64, 64)
        assert json.loads(image.info["parameters"])["num_inference_steps"] == 6


def test_generate_several_as_jpeg(tmp_path: Path) -> None:
    stepserve("generate", "pizza", "-o", str(tmp_path / "p.jpg"), "-n", "2", "--steps", "2")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p-0.jpg", "p-1.jpg"]


def test_an_image_is_changed_and_a_part_of_it_repainted(tmp_path: Path) -> None:
    start, mask = tmp_path / "start.jpg", tmp_path / "mask.png"
    Image.new("RGB", (100, 80), (40, 90, 200)).save(start)
    Image.new("L", (64, 64), 255).save(mask)
    given = ("--image", str(start), "--strength", "0.5", "--steps", "4", "--seed", "1")
    interval = ("--guidance-start", "0.25", "--guidance-end", "0.75")
    stepserve("generate", "a red heart", "-o", str(tmp_path / "changed.png"), *given, *interval)
    masked = ("--mask", str(mask))
    stepserve("generate", "a red heart", "-o", str(tmp_path / "part.png"), *given, *masked)
    for name, task in (("changed", "image-to-image"), ("part", "inpainting")):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.size == (80, 64)
            told = json.loads(image.info["parameters"])
        assert (told["task"], told["strength"]) == (task, 0.5)
        assert told["guidance_start"] == (0.25 if name == "changed" else 0)
        assert [len(digest) for digest in told["images_sha256"]] == [64]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("generate", "x", "--size", "50x50"), ("size", "48 to 128")),
        (("generate", "x", "--size", "big"), ("size", "big")),
        (("generate", "x", "--scheduler", "EulerDiscrete"), ("EulerDiscreteScheduler",)),
        (("generate", "x", "--model", "nope"), ("nope", "emoji")),
        (("generate", "x", "--image", "nowhere.png"), ("--image", "nowhere.png", "No such file")),
        (("generate", "x", "--mask", "pyproject.toml"), ("--mask", "--image")),
        (("generate", "x", "--reference", "no.png=0.8"), ("--reference", "no.png", "No such")),
        (("generate", "x", "-o", "x.gif"), ("--output", "x.gif", ".webp")),
        (("generate", "x", "--image", "pyproject.toml"), ("image of", "cannot be read")),
        (("generate", "x", "--guidance-end", "2"), ("guidance_end", "at most 1", "2.0")),
        (("generate", "x", "--step-cache", "fast"), ("step_cache.method", "easycache", "fast")),
        (("generate", "x", "--step-cache", "easycache:"), ("--step-cache", "easycache:0.15")),
        (("generate", "x", "--step-cache", "magcache:9"), ("step_cache.threshold", "0.001 to 1")),
        (("calibrate", "nope"), ("nope", "emoji")),
        (("calibrate", "--steps", "5000"), ("5000", "steps")),
    ],
)
def test_mistakes_are_explained_in_one_line(
    arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    explained = stepserve(*arguments, expect=1).stderr
    assert explained.startswith("error: ")
    assert len(explained.splitlines()) == 1
    for word in words:
        assert word in explained


def test_a_mistake_is_written_to_stderr_and_the_exit_code_is_1() -> None:
    result = in_a_process("models", "--config", "nowhere.yaml", expect=1)
    assert result.stderr.startswith("error: ")
    assert result.stdout == ""


def test_models_and_config(tmp_path: Path) -> None:
    assert "embedded" in stepserve("models").stdout
    config = tmp_path / "stepserve.yaml"
    config.write_text("http:\n  prot: 80\n")
    result = stepserve("config", "check", "--config", str(config), expect=1)
    assert "http.prot" in result.stderr
    assert "port" in result.stderr


@pytest.mark.parametrize(
    "command", ["serve", "generate", "calibrate", "models", "train", "explain", "config"]
)
def test_every_command_has_help(command: str) -> None:
    assert len(stepserve(command, "--help").stdout) > 200


def test_keys_of_a_file_are_listed_without_what_they_open(tmp_path: Path) -> None:
    file = str(tmp_path / "keys.yaml")
    made = stepserve("keys", "create", "shop", "--file", file, "--max-concurrent", "4").stdout
    listed = stepserve("keys", "list", "--file", file).stdout
    assert listed == "shop  any number a minute, 4 at once, up to interactive\n"
    assert not set(listed.split()) & {word for word in made.split() if len(word) > 40}
    assert "shop" not in stepserve("keys", "list").stdout


def write_adapter(path: Path) -> Path:
    """A LoRA for the embedded model that turns round what its last layer says."""
    weights = load_file(EMBEDDED / "unet" / "diffusion_pytorch_model.safetensors")
    first = weights["conv_out.weight"].float()
    second = -2 * torch.eye(first.shape[0])[:, :, None, None]
    layer = "unet.conv_out"
    save_file({f"{layer}.lora_A.weight": first, f"{layer}.lora_B.weight": second}, path)
    return path


def test_generate_with_an_adapter(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "turned.v1.safetensors")
    images = []
    for scale in ("0", "1"):
        target = tmp_path / f"{scale}.png"
        given = ("--adapter", f"{adapter}={scale}")
        stepserve("generate", "pizza", "-o", str(target), "--seed", "3", "--steps", "4", *given)
        with Image.open(target) as image:
            told = json.loads(image.info["parameters"])["adapters"]
            assert told == [{"name": "turned.v1", "scale": float(scale)}]
            images.append(image.tobytes())
    assert images[0] != images[1]


def test_a_model_is_calibrated_and_then_skips_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(EMBEDDED, tmp_path / "model"))
    (folder / MAGNITUDES).unlink()
    monkeypatch.setenv("STEPSERVE_MODELS__EMOJI__PATH", str(folder))
    cached = ("generate", "pizza", "--steps", "12", "--step-cache", "magcache:0.2")
    refused = stepserve(*cached, "-o", str(tmp_path / "p.png"), expect=1).stderr
    assert "step_cache.method 'magcache' cannot be used with model 'emoji'" in refused

    prompts = ("--prompt", "a green tree", "--prompt", "a smiling cat")
    written = stepserve("calibrate", "--steps", "12", *prompts).stdout
    assert written.strip() == str(folder / MAGNITUDES)
    # The embedded model's own were measured at other steps, with other prompts.
    for ours, own in zip(read_magnitudes(folder), at_steps(12), strict=True):
        assert ours == pytest.approx(own, rel=0.15)

    drawn = stepserve(*cached, "-o", str(tmp_path / "p.png"))
    skipped = skipped_calls(read_magnitudes(folder), 12, 0.2)
    assert skipped
    assert f"{12 - len(skipped)} of 12 denoiser calls ran" in drawn.stderr
    with Image.open(tmp_path / "p.png") as image:
        told = json.loads(image.info["parameters"])["step_cache"]
    assert told == {"method": "magcache", "threshold": 0.2}


def at_steps(steps: int) -> list[float]:
    """The embedded model's own magnitudes, at the nearest of the calls that were measured."""
    measured = read_magnitudes(EMBEDDED)
    places = (round(step / (steps - 1) * (len(measured) - 1)) for step in range(steps))
    return [measured[place] for place in places]
