"""What an operator may set: one YAML file and `STEPSERVE_` environment variables, checked at boot.

The environment wins over the file, the file over the defaults. `STEPSERVE_HTTP__PORT=80` sets
`http.port`; a model's id is written in capitals with `_` for other signs, so that
`STEPSERVE_MODELS__SD_1_5__REPLICAS=2` sets `models.sd-1.5.replicas`.
A variable may add a model by giving its `path`. The value `null` means none.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from stepserve.domain.step_cache import (
    LEAST_THRESHOLD,
    MOST_THRESHOLD,
    OFF,
    StepCacheMethod,
    StepCacheUse,
)

PREFIX = "STEPSERVE_"
CONFIG_VARIABLE = "STEPSERVE_CONFIG"
"""The variable that names the YAML file where no path is given."""

CLIENT_VARIABLES = ("STEPSERVE_API_KEY",)
"""What clients keep in the same shell: no settings."""

ATTENTION_BACKENDS = (
    "native",
    "flex",
    "flash",
    "flash_varlen",
    "sage",
    "sage_varlen",
    "xformers",
    "_flash_3",
    "_flash_varlen_3",
    "_native_cudnn",
    "_native_efficient",
    "_native_flash",
    "_native_math",
    "_native_npu",
    "_native_xla",
    "_sage_qk_int8_pv_fp8_cuda",
    "_sage_qk_int8_pv_fp8_cuda_sm90",
    "_sage_qk_int8_pv_fp16_cuda",
    "_sage_qk_int8_pv_fp16_triton",
)
"""What diffusers knows, without those whose code it would download when they are chosen."""

RESULTS_FOLDER = str(Path(tempfile.gettempdir()) / f"stepserve-results-{os.getuid()}")

HIDDEN = "(hidden; not shown)"

HUB_ID = re.compile(r"^[\w-][\w.-]*/[\w-][\w.-]*$")
LOCAL = re.compile(r"(?![\w.+-]+:)|(file|local):")
"""How addresses of local folders begin: without a scheme, or with these."""

SECRETS = (("results", "secret"), ("auth", "keys"))
"""Settings that no message shows."""

RENAMED = {"max_waiting_pictures": "max_pending_images"}
"""Keys of settings that have another name now, with that name."""

KeyPath = tuple[str, ...]

# Kubernetes puts such variables into every pod beside a Service whose name begins with
# "stepserve": they are not ours, and refusing them would stop the pod.
_SERVICE_LINK = re.compile(
    r"\w+_SERVICE_(HOST|PORT)(_\w+)?=.*"
    r"|\w+_PORT_\d+_(TCP|UDP|SCTP)(_\w+)?=.*"
    r"|\w+_PORT=(tcp|udp|sctp)://.*",
    re.DOTALL,
)
_NEW_MODEL = re.compile(r"STEPSERVE_MODELS__(\w{1,64}?)__PATH")


class ConfigError(Exception):
    """The configuration cannot be used; the message lists every problem found."""


def _refuse_bool(value: Any) -> Any:
    """Refuse `yes` and `true` where a number is due: pydantic would read them as 1."""
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    return value


_Number = BeforeValidator(_refuse_bool)
PositiveInt = Annotated[int, _Number, Field(ge=1)]
# Far smaller numbers are over 0 as well, and work out to 0 or infinity where they are used.
PositiveSeconds = Annotated[float, _Number, Field(ge=0.001, allow_inf_nan=False)]
Amount = Annotated[float, _Number, Field(ge=0, allow_inf_nan=False)]
ByteCount = Annotated[int, _Number, Field(ge=0)]
Revision = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{40}$")]
ModelId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,64}$")]


def _split_at_commas(value: Any) -> Any:
    """Read a list as a variable holds it: `a,b`."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


_Listed = BeforeValidator(_split_at_commas)


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _empty_section_means_defaults(cls, data: Any) -> Any:
        return {} if data is None else data


class HttpSettings(_Section):
    """The HTTP API."""

    host: str = "127.0.0.1"
    port: Annotated[int, _Number, Field(ge=1, le=65535)] = 8000
    max_body_bytes: PositiveInt = 1_048_576
    max_upload_bytes: PositiveInt = 20_971_520
    """As `max_body_bytes`, for requests that bring images along."""
    max_bodies_bytes: PositiveInt = 268_435_456
    """Of all bodies that one ingress replica receives at a time."""
    max_url_bytes: PositiveInt = 8192
    """Of path and query."""
    max_header_bytes: PositiveInt = 32_768
    """Of all headers of a request together."""
    max_headers: PositiveInt = 100
    max_connections: PositiveInt = 1000
    """Of one ingress replica; fewer where it may not open as many descriptors."""
    header_timeout_s: PositiveSeconds = 20.0
    """Seconds in which URL and headers of a request must arrive."""
    body_timeout_s: PositiveSeconds = 120.0
    """Seconds in which its body must arrive."""
    send_timeout_s: PositiveSeconds = 30.0
    """Seconds for which a client may leave a response unread."""
    keep_alive_s: PositiveSeconds = 90.0
    """Seconds for which a connection may be silent after a response."""
    request_timeout_s: PositiveSeconds = 600.0
    ingress_replicas: PositiveInt = 1
    """Processes that serve HTTP."""
    allow_anonymous: bool = False
    """Serve other machines without API keys."""
    cors_origins: Annotated[tuple[str, ...], _Listed] = ()
    """Pages from elsewhere that may call from a browser, such as `https://example.com`."""

    @model_validator(mode="after")
    def _room_for_a_body(self) -> HttpSettings:
        largest = max(self.max_body_bytes, self.max_upload_bytes)
        if self.max_bodies_bytes < largest:
            raise ValueError(
                f"max_bodies_bytes is {self.max_bodies_bytes}, less than one body may have "
                f"({largest})"
            )
        return self


class TelemetrySettings(_Section):
    """What operators see."""

    metrics: bool = True
    """Whether `GET /metrics` shows metrics; they are recorded in any case."""
    log_format: Literal["auto", "json", "text"] = "auto"
    """JSON objects or readable lines; auto: readable lines on a terminal."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """From which level on; `debug` tells of probes and of pages that keep asking as well."""
    log_prompts: bool = False
    """Whether access lines tell prompts."""


class AuthSettings(_Section):
    """Who may call. Without keys everybody may, and only this machine is listened to."""

    keys_file: Annotated[str, Field(min_length=1)] | None = None
    """A YAML file of keys, as `stepserve keys create` writes it."""
    keys: str | None = None
    """Keys as `name=key` or `name=sha256:hash`, by commas."""


class UploadSettings(_Section):
    """Images that requests bring along."""

    max_bytes: PositiveInt = 10_485_760
    """Of one image file."""
    max_pixels: Annotated[int, _Number, Field(ge=1, le=16_777_216)] = 16_777_216
    """Of one image; known before it is decoded."""
    max_total_pixels: PositiveInt = 67_108_864
    """Of all images of one request, which are decoded together; each takes 3 bytes then."""
    urls: bool = False
    """Whether images are fetched from public `http:` and `https:` addresses."""
    fetch_timeout_s: PositiveSeconds = 10.0
    """For those of one request together."""
    max_pending_bytes: PositiveInt = 100_663_296
    """Of bodies with images that one ingress holds until their responses; more get 429."""


class ResultSettings(_Section):
    """Where images are kept that are answered as links."""

    address: Annotated[str, Field(min_length=1)] = RESULTS_FOLDER
    """A local folder that all ingress replicas see, or such as `s3://bucket/prefix`."""
    expires_s: PositiveSeconds = 3600.0
    secret: Annotated[str, Field(min_length=16)] | None = None
    """What links are signed with; None: made once and kept in the local folder."""
    secret_file: Annotated[str, Field(min_length=1)] | None = None
    """A file that holds the secret, such as a mounted one; read when the service starts."""
    public_url: str = ""
    """What links begin with, where it is not how clients address the server."""

    @model_validator(mode="after")
    def _one_secret_for_all_replicas(self) -> ResultSettings:
        if self.secret and self.secret_file:
            raise ValueError("secret and secret_file are both set; give one")
        if not LOCAL.match(self.address) and not self.secret and not self.secret_file:
            raise ValueError("address is no local folder, so secret or secret_file must be set")
        return self


class EngineSettings(_Section):
    """One engine: how much it takes on, and how much of the machine it may use."""

    max_rows: PositiveInt | None = None
    """Most rows in one shared forward of the denoiser; None means measured at start, up to 64."""
    max_pending_images: PositiveInt = 64
    fixed_rows: bool = True
    """Where the load would decide the last bits of an image, fill forwards up to one row count."""
    pad_prompts: bool = True
    """Fill texts up to a few lengths, where a model takes a mask, so that any prompts share."""
    mix_lengths: bool = True
    """Let requests of different sizes and prompts share forwards, where a model takes that."""
    threads: PositiveInt | None = None
    """Torch threads; None means as many as there are cores."""
    niceness: Annotated[int, _Number, Field(ge=0, le=19)] = 10
    gradients: bool = False
    """Whether pipelines may compute gradients, as some guidance does; costs a few percent."""
    stuck_after_s: PositiveSeconds = 120.0
    """Longer than any forward takes: a replica that is silent for so long is replaced."""
    drain_s: Amount = 20.0
    """Seconds that accepted requests get to finish when the server stops."""


def _check_attention_backend(name: str) -> str:
    if name not in ATTENTION_BACKENDS:
        known = ", ".join(ATTENTION_BACKENDS)
        raise ValueError(f"is none of {known}{_did_you_mean(name, ATTENTION_BACKENDS)}")
    return name


AttentionBackend = Annotated[str, AfterValidator(_check_attention_backend)]


class StepCacheSettings(_Section):
    """Which denoiser calls of requests that say nothing of it are skipped."""

    method: StepCacheMethod = StepCacheUse.method
    """What decides; magcache needs magnitudes, as `stepserve calibrate` measures them."""
    threshold: Annotated[float, _Number, Field(ge=LEAST_THRESHOLD, le=MOST_THRESHOLD)] | None = None
    """The expected relative error that may add up until a call has to run; None: the usual one."""

    def use(self) -> StepCacheUse:
        """What it means for a request."""
        return StepCacheUse.of(self.method, self.threshold)


def _read_step_cache(value: Any) -> Any:
    # YAML reads a plain `off` as false.
    if value is False or value == OFF:
        return None
    return {"method": value} if isinstance(value, str) else value


class SpeedSettings(_Section):
    """What makes a model faster or smaller; `docs/performance.md` says by how much."""

    channels_last: bool | None = None
    """Memory format of convolutions; None means for UNets and VAEs, where it helps."""
    compile: bool = False
    """Compile the denoiser with torch.compile in the background, while eager code serves."""
    cuda_graphs: bool = True
    """On CUDA, record each shape of a denoiser's forward once and replay it: the same images."""
    attention_backend: AttentionBackend | None = None
    """How the denoiser computes attention; None means as diffusers chooses."""
    vae_slicing: bool = False
    """Decode the images of one request one by one: less memory."""
    vae_tiling: bool = False
    """Decode large images in overlapping tiles: less memory, slightly other images."""
    cpu_offload: Literal["none", "model", "sequential"] = "none"
    """Keep modules (or layers) on the CPU until they are called; on CUDA only."""
    quantization: Literal["none", "int8", "int8_dynamic"] = "none"
    """Weights of the denoiser's linear layers as integers, and for int8_dynamic its activations."""
    prompt_cache_bytes: ByteCount = 64 * 2**20
    """How much is kept of the outputs of each text encoder; 0 keeps none."""
    step_cache: Annotated[StepCacheSettings | None, BeforeValidator(_read_step_cache)] = None
    """Skip denoiser calls that can be predicted: faster, and slightly other images; off: none."""


class AutoscalingSettings(_Section):
    """How many replicas a model has, by the work in flight."""

    min_replicas: Annotated[int, _Number, Field(ge=0)] = 1
    """With 0 a model that nobody wants gives its device up, and the next request waits for it."""
    max_replicas: PositiveInt = 2
    target_backlog_s: PositiveSeconds = 5.0
    """Seconds within which everything in flight should be finished."""
    upscale_delay_s: Amount = 2.0
    """Seconds for which more replicas must be wanted before there are."""
    downscale_delay_s: Amount = 60.0
    """Seconds for which fewer replicas must be wanted before there are."""

    @model_validator(mode="after")
    def _in_order(self) -> AutoscalingSettings:
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas is {self.max_replicas}, below min_replicas ({self.min_replicas})"
            )
        return self


class IpAdapterSettings(_Section):
    """One IP-Adapter of a model, which reads reference images."""

    path: Annotated[str, Field(min_length=1)]
    """Safetensors file, or a folder that holds one, or with `revision` a Hugging Face hub id."""
    revision: Revision | None = None
    """Commit of the hub's repository."""
    subfolder: str = ""
    """Where in the folder or repository the weights are, such as `models` or `sdxl_models`."""
    weight_name: Annotated[str, Field(min_length=1)] | None = None
    """Name of the weights' file; None: the only safetensors file that is there."""
    image_encoder_path: Annotated[str, Field(min_length=1)] | None = None
    """Folder or hub id of the image encoder; None: that of the adapter."""
    image_encoder_revision: Revision | None = None
    image_encoder_folder: str | None = None
    """Where in there it is; None: `image_encoder` in the subfolder of the adapter, or with
    `image_encoder_path` that path itself. A name with a slash begins at the top, as in diffusers.
    It is not looked for where the pipeline has an image encoder of its own."""

    @model_validator(mode="after")
    def _hub_ids_have_a_revision(self) -> IpAdapterSettings:
        _check_hub_id("path", self.path, self.revision)
        _check_hub_id("image_encoder_path", self.image_encoder_path, self.image_encoder_revision)
        if self.revision is not None and self.weight_name is None:
            raise ValueError("weight_name must be set: a hub's repository holds many files")
        return self


class ControlSettings(_Section):
    """One control of a model: a ControlNet or a T2I-Adapter."""

    path: Annotated[str, Field(min_length=1)]
    """Diffusers folder of the network, or with `revision` a Hugging Face hub id."""
    revision: Revision | None = None
    """Commit of the hub's repository."""
    subfolder: str = ""
    """Where in the folder or repository the network is."""
    preprocessor: Literal["none", "canny", "grey", "invert", "tile"] = "none"
    """What makes the control image of requests that name no preprocessor."""
    mode: Annotated[int, _Number, Field(ge=0)] | str | None = None
    """Of a union network: which of its kinds of control images, by name or number."""

    @model_validator(mode="after")
    def _a_hub_id_has_a_revision(self) -> ControlSettings:
        _check_hub_id("path", self.path, self.revision)
        return self


def _as_control(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


def _check_hub_id(field: str, path: str | None, revision: str | None) -> None:
    if revision is not None and not HUB_ID.match(path or ""):
        raise ValueError(f"a revision belongs to a hub id such as owner/name in {field}: {path!r}")


class ModelSettings(SpeedSettings):
    """One served model."""

    path: Annotated[str, Field(min_length=1)] | None = None
    """Local folder, or with `revision` a Hugging Face hub id; None means the embedded model."""
    revision: Revision | None = None
    """Commit of the hub's repository: a model does not change under a running service."""
    aliases: Annotated[tuple[ModelId, ...], _Listed] = ()
    """Other names that requests may give it, such as those that OpenAI's clients send."""
    replicas: PositiveInt = 1
    routing: Literal["expected-finish", "power-of-two"] = "expected-finish"
    """Which replica gets a request: the one that should finish it first, or Ray Serve's own way."""
    autoscaling: AutoscalingSettings | None = None
    """Where it is set, `replicas` is not asked."""
    num_cpus: Amount = 1.0
    num_gpus: Amount = 0.0
    """GPUs of each replica; of a fraction, several replicas share a GPU."""
    accelerator_type: Annotated[str, Field(min_length=1)] | None = None
    """Kind of accelerator its replicas run on, as Ray names it: A100, L4, H100. None: any."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    device: Annotated[str, StringConstraints(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"
    adapters: dict[Annotated[str, Field(min_length=1)], Annotated[str, Field(min_length=1)]] = {}
    """LoRA adapters by name: a safetensors file, or a folder that holds one."""
    adapters_folder: Annotated[str, Field(min_length=1)] | None = None
    """Each safetensors file in it is an adapter; new ones are found while serving."""
    ip_adapters: dict[Annotated[str, Field(min_length=1)], IpAdapterSettings] = {}
    """IP-Adapters by name; all are loaded with the model."""
    controls: dict[
        Annotated[str, Field(min_length=1)],
        Annotated[ControlSettings, BeforeValidator(_as_control)],
    ] = {}
    """ControlNets and T2I-Adapters by name; a path alone is enough. Loaded when first used."""
    max_loaded_controls: PositiveInt = 4
    """Control networks that stay loaded while idle, and most controls of one request."""
    trust_remote_code: bool = False
    """Run Python code that lies in the model's folder."""
    allow_pickle: bool = False
    """Read weights from pickle files where there are no safetensors; they may hold code to run."""
    safety_checker: Literal["keep", "drop"] = "keep"
    """Whether images that the folder's own safety checker flags are withheld, where it has one."""
    max_loaded_adapters: PositiveInt = 4
    """Adapters that stay loaded while idle, and most of one request."""
    engine: EngineSettings = EngineSettings()

    def missing_paths(self) -> Iterator[str]:
        """What is not there, on this machine, of adapters and local controls and IP-Adapters."""
        for name, file in self.adapters.items():
            if not Path(file).expanduser().exists():
                yield f"adapters.{name}: {file} does not exist; correct the path"
        for section in ("controls", "ip_adapters"):
            for name, one in getattr(self, section).items():
                path = Path(one.path, one.subfolder).expanduser()
                if one.revision is None and not path.exists():
                    yield f"{section}.{name}.path: {path} does not exist; correct the path"

    @field_validator("revision")
    @classmethod
    def _must_be_of_a_hub_id(cls, value: str | None, info: ValidationInfo) -> str | None:
        path = info.data.get("path")
        if value is not None and not HUB_ID.match(path or ""):
            raise ValueError(f"belongs to a hub id such as owner/name in path, which is {path!r}")
        return value


NAMED: Mapping[KeyPath, type[BaseModel]] = {
    ("ip_adapters",): IpAdapterSettings,
    ("controls",): ControlSettings,
}
"""Sections of a model that hold one section for each name."""


class Settings(_Section):
    """Everything an operator may set. `Settings()` holds the defaults and reads nothing."""

    http: HttpSettings = HttpSettings()
    telemetry: TelemetrySettings = TelemetrySettings()
    auth: AuthSettings = AuthSettings()
    uploads: UploadSettings = UploadSettings()
    results: ResultSettings = ResultSettings()
    models: Annotated[dict[ModelId, ModelSettings], Field(min_length=1)] = {
        "emoji": ModelSettings()
    }
    default_model: str = Field(default="", validate_default=True)
    """Serves the requests that name no model; the first model where it is not set."""

    @field_validator("models")
    @classmethod
    def _names_are_told_apart(cls, models: dict[str, ModelSettings]) -> dict[str, ModelSettings]:
        owners = {model_id: model_id for model_id in models}
        for model_id, model in models.items():
            for alias in model.aliases:
                if alias in owners:
                    what = (
                        "a model's id" if owners[alias] == alias else f"of {owners[alias]!r}, too"
                    )
                    raise ValueError(f"alias {alias!r} of {model_id!r} is {what}; names are unique")
                owners[alias] = model_id
        return models

    @field_validator("default_model", mode="before")
    @classmethod
    def _default_to_the_first_model(cls, value: Any, info: ValidationInfo) -> Any:
        return value or next(iter(info.data.get("models", {})), "")

    @field_validator("default_model")
    @classmethod
    def _must_be_a_model(cls, value: str, info: ValidationInfo) -> str:
        models = info.data.get("models")
        if models and value not in models:
            hint = _did_you_mean(value, models)
            raise ValueError(f"no model {value!r} among {', '.join(models)}{hint}")
        return value

    def model_id(self, name: str) -> str | None:
        """Return the id of the model with this id or alias, or None."""
        named = (model_id for model_id, model in self.models.items() if name in model.aliases)
        return name if name in self.models else next(named, None)

    def describe(self) -> str:
        """Return every setting in effect as YAML as `load_settings` reads it, but for secrets."""
        tree = self.model_dump(mode="json")
        for section, key in SECRETS:
            if tree[section][key] is not None:
                tree[section][key] = HIDDEN
        return yaml.safe_dump(tree, sort_keys=False)


def settings_file(
    path: Path | None = None, environ: Mapping[str, str] | None = None
) -> Path | None:
    """The YAML file of the settings: `path`, else the one that `STEPSERVE_CONFIG` names, if any."""
    environ = os.environ if environ is None else environ
    named = environ.get(CONFIG_VARIABLE)
    return Path(named) if path is None and named else path


def holds_settings(path: Path) -> bool:
    """Whether a file says anything: it may be empty, or have nothing but comments.

    Raises:
        ConfigError: it cannot be read.
    """
    return bool(_read_yaml(path))


def load_settings(
    path: Path | None = None,
    environ: Mapping[str, str] | None = None,
    *,
    must_name_models: bool = False,
) -> Settings:
    """Read, merge and check the settings.

    Args:
        path: YAML file; where None, the one that `STEPSERVE_CONFIG` names, if any.
        environ: environment variables; where None, those of this process.
        must_name_models: refuse a file without models, where the default one would take the place
            of those that are served. It may be about to be written.

    Raises:
        ConfigError: the file cannot be read, or a key or value is wrong (all are listed).
    """
    environ = os.environ if environ is None else environ
    path = settings_file(path, environ)
    tree = _read_yaml(path) if path else {}
    if path and must_name_models and not _names_models(tree, environ):
        what = "names no models" if tree else "holds no settings"
        raise ConfigError(
            f"{path} {what}, and the default model would take the place of all that are served; "
            "write them below `models`"
        )
    tree, origins, problems = _with_environment(tree, environ)
    try:
        settings = Settings.model_validate(tree)
    except ValidationError as error:
        problems += [_explain(item, origins) for item in error.errors()]
    if problems:
        raise ConfigError("\n  - ".join([f"wrong settings ({path or 'no file'}):", *problems]))
    return settings


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # The latter two: of dates that do not exist, and of brackets without end.
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict | None):
        raise ConfigError(f"{path} must hold keys and values, not a {type(tree).__name__}")
    return tree or {}


def _names_models(tree: Mapping[str, Any], environ: Mapping[str, str]) -> bool:
    """Whether the file or a variable says which models there are."""
    added = any(_NEW_MODEL.fullmatch(name) for name, _ in _own_variables(environ))
    return tree.get("models") is not None or added


def _with_environment(
    tree: dict[str, Any], environ: Mapping[str, str]
) -> tuple[dict[str, Any], dict[KeyPath, str], list[str]]:
    """Return `tree` with the variables laid over it, which key came from where, and problems."""
    tree = dict(tree)
    variables = dict(_own_variables(environ))
    known = _known_variables(_model_ids(tree, variables))
    origins: dict[KeyPath, str] = {}
    problems = []
    for name, value in variables.items():
        if name not in known:
            problems.append(f"{name}: {_unknown_variable(name, known)}")
            continue
        origins[known[name]] = name
        _put(tree, known[name], None if value == "null" else value)
    return tree, origins, problems


def _own_variables(environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for name, value in sorted(environ.items()):
        is_ours = name.startswith(PREFIX) and name not in (CONFIG_VARIABLE, *CLIENT_VARIABLES)
        # An empty variable is how compose files and shells say "not set".
        if is_ours and value and not _SERVICE_LINK.fullmatch(f"{name}={value}"):
            yield name, value


def _model_ids(tree: dict[str, Any], variables: Iterable[str]) -> list[str]:
    """Return the ids in the file (or the default one), then those that variables add."""
    if tree.get("models") is None:
        tree["models"] = {model_id: {} for model_id in Settings().models}
    in_file = tree["models"] if isinstance(tree["models"], dict) else {}
    ids = {as_variable(str(model_id)): str(model_id) for model_id in in_file}
    for name in variables:
        if match := _NEW_MODEL.fullmatch(name):
            ids.setdefault(match[1], match[1].lower())
    return list(ids.values())


def _known_variables(model_ids: Iterable[str]) -> dict[str, KeyPath]:
    paths = _known_paths(model_ids)
    return {PREFIX + "__".join(as_variable(key) for key in path): path for path in paths}


def _known_paths(model_ids: Iterable[str]) -> list[KeyPath]:
    paths = [path for path in _leaves(Settings) if path[0] != "models"]
    for model_id in model_ids:
        paths += [("models", model_id, *path) for path in _leaves(ModelSettings)]
    return paths


def _leaves(section: type[BaseModel]) -> Iterator[KeyPath]:
    for name, field in section.model_fields.items():
        inner = _section_type(field.annotation)
        yield from ((name, *path) for path in _leaves(inner)) if inner else ((name,),)


def _section_type(annotation: Any) -> type[BaseModel] | None:
    # A section that may be left out is one, too.
    kinds = [kind for kind in get_args(annotation) if kind is not NoneType] or [annotation]
    is_section = isinstance(kinds[0], type) and issubclass(kinds[0], BaseModel)
    return kinds[0] if is_section and len(kinds) == 1 else None


def as_variable(key: str) -> str:
    """A key of the settings as it is written in names of environment variables."""
    return re.sub(r"[.-]", "_", key).upper()


def _put(tree: dict[str, Any], path: KeyPath, value: str | None) -> None:
    for key in path[:-1]:
        inner = tree.get(key)
        if not isinstance(inner, dict | None):
            return  # The file has a value where a section belongs: pydantic will say so.
        # Copied, because a YAML alias may share it with another section.
        tree[key] = dict(inner or {})
        tree = tree[key]
    tree[path[-1]] = value


def _explain(item: Any, origins: Mapping[KeyPath, str]) -> str:
    path: KeyPath = tuple(str(part) for part in item["loc"])
    name = origins.get(path) or ".".join(path)
    if item["type"] == "extra_forbidden" and path[-1] in RENAMED:
        return f"{name}: this setting is now called {'.'.join([*path[:-1], RENAMED[path[-1]]])!r}"
    if item["type"] == "extra_forbidden":
        return f"{name}: unknown key{_did_you_mean(path[-1], _siblings(path), path[:-1])}"
    given = HIDDEN if _holds_secret(path) else repr(item["input"])
    return f"{name}: {item['msg'].removeprefix('Value error, ')}, got {given}"


def _holds_secret(path: KeyPath) -> bool:
    """Whether what is there is a secret, or a section that holds one."""
    section = path[:2]
    return any(secret[: len(section)] == section for secret in SECRETS)


def _siblings(path: KeyPath) -> set[str]:
    """Return the keys that may stand where the unknown last key of `path` stands."""
    if path[0] == "models" and path[2:3] in NAMED and len(path) == 5:
        return set(NAMED[path[2:3]].model_fields)
    model_ids = path[1:2] or ("any",)
    parent, depth = path[:-1], len(path) - 1
    return {leaf[depth] for leaf in _known_paths(model_ids) if leaf[:depth] == parent}


def _did_you_mean(word: str, known: Iterable[str], parent: KeyPath = ()) -> str:
    close = get_close_matches(word, list(known), n=1)
    return f"; did you mean {'.'.join([*parent, close[0]])!r}?" if close else ""


def _unknown_variable(name: str, known: Iterable[str]) -> str:
    for old, new in RENAMED.items():
        if name.endswith(f"__{as_variable(old)}"):
            renamed = name.removesuffix(as_variable(old)) + as_variable(new)
            return f"this variable is now called {renamed!r}"
    # Compared without the prefix: it would make any two variables look alike.
    rest = [variable.removeprefix(PREFIX) for variable in known]
    close = get_close_matches(name.removeprefix(PREFIX), rest, n=1)
    hint = f"; did you mean {PREFIX + close[0]!r}?" if close else ""
    return f"unknown variable{hint}"
