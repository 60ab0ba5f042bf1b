from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError
from stepserve.config import (
    ConfigError,
    EngineSettings,
    HttpSettings,
    ModelSettings,
    ResultSettings,
    Settings,
    load_settings,
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "stepserve.yaml"


def problems_of(path: Path | None, environ: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_settings(path, environ or {})
    return str(caught.value)


def test_defaults():
    settings = load_settings(None, {})

    assert settings == Settings()
    assert settings.http == HttpSettings(
        host="127.0.0.1", port=8000, max_body_bytes=1_048_576, request_timeout_s=600
    )
    assert settings.models == {"emoji": ModelSettings()}
    assert settings.default_model == "emoji"
    assert settings.models["emoji"].engine == EngineSettings(
        max_rows=None, max_pending_images=64, threads=None, niceness=10, drain_s=20.0
    )
    assert settings.models["emoji"].path is None


def test_file_over_defaults(file: Path):
    file.write_text(
        "http: {port: 9000}\n"
        "models:\n"
        "  sd-1.5: {path: /models/sd, num_gpus: 0.5, dtype: float16, engine: {max_rows: 8}}\n"
        "  small:\n"
    )
    settings = load_settings(file, {})

    assert settings.http == HttpSettings(port=9000)
    assert list(settings.models) == ["sd-1.5", "small"]
    assert settings.default_model == "sd-1.5"
    assert settings.models["small"] == ModelSettings()
    sd = settings.models["sd-1.5"]
    assert (sd.path, sd.num_gpus, sd.dtype) == ("/models/sd", 0.5, "float16")
    assert sd.engine == EngineSettings(max_rows=8)


def test_adapters_of_a_model(file: Path):
    file.write_text(
        "models:\n"
        "  sd:\n"
        "    adapters: {pixels.v2: /adapters/pixels.safetensors}\n"
        "    max_loaded_adapters: 2\n"
    )
    model = load_settings(file, {"STEPSERVE_MODELS__SD__ADAPTERS_FOLDER": "/more"}).models["sd"]

    assert model.adapters == {"pixels.v2": "/adapters/pixels.safetensors"}
    assert (model.adapters_folder, model.max_loaded_adapters) == ("/more", 2)


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("adapters: [a.safetensors]", "models.sd.adapters: "),
        ("adapters: {a: 1}", "models.sd.adapters.a: "),
        ("max_loaded_adapters: 0", "models.sd.max_loaded_adapters: "),
        ("adapter_folder: x", "did you mean 'models.sd.adapters_folder'?"),
    ],
)
def test_wrong_adapters(file: Path, setting: str, problem: str):
    file.write_text(f"models:\n  sd:\n    {setting}\n")
    assert problem in problems_of(file)


def test_environment_over_file(file: Path):
    file.write_text("http: {port: 9000, host: 0.0.0.0}\nmodels: {sd-1.5: {replicas: 2}}\n")
    environ = {
        "STEPSERVE_HTTP__PORT": "9001",
        "STEPSERVE_MODELS__SD_1_5__ENGINE__THREADS": "2",
        "STEPSERVE_MODELS__SD_1_5__DTYPE": "float32",
        "STEPSERVE_MODELS__SD_1_5__ENGINE__DRAIN_S": "1.5",
    }
    settings = load_settings(file, environ)

    assert (settings.http.host, settings.http.port) == ("0.0.0.0", 9001)
    model = settings.models["sd-1.5"]
    assert (model.replicas, model.dtype) == (2, "float32")
    assert (model.engine.threads, model.engine.drain_s) == (2, 1.5)


def test_environment_changes_the_default_model_in_place():
    settings = load_settings(None, {"STEPSERVE_MODELS__EMOJI__REPLICAS": "3"})

    assert settings.models == {"emoji": ModelSettings(replicas=3)}


def test_environment_adds_a_model_that_has_a_path():
    environ = {
        "STEPSERVE_MODELS__SDXL__PATH": "/models/sdxl",
        "STEPSERVE_MODELS__SDXL__NUM_GPUS": "1",
        "STEPSERVE_DEFAULT_MODEL": "sdxl",
    }
    settings = load_settings(None, environ)

    assert list(settings.models) == ["emoji", "sdxl"]
    assert settings.models["sdxl"] == ModelSettings(path="/models/sdxl", num_gpus=1)
    assert settings.default_model == "sdxl"


def test_null_and_empty_variables(file: Path):
    file.write_text("models: {emoji: {path: /x, engine: {threads: 4, max_rows: 3}}}\n")
    environ = {
        "STEPSERVE_MODELS__EMOJI__PATH": "null",
        "STEPSERVE_MODELS__EMOJI__ENGINE__THREADS": "null",
        "STEPSERVE_MODELS__EMOJI__ENGINE__MAX_ROWS": "",
    }
    model = load_settings(file, environ).models["emoji"]

    assert (model.path, model.engine.threads, model.engine.max_rows) == (None, None, 3)


def test_variable_names_the_file(file: Path):
    file.write_text("http: {port: 9000}")

    assert load_settings(None, {"STEPSERVE_CONFIG": str(file)}).http.port == 9000


def test_the_path_given_wins_over_the_variable(file: Path):
    file.write_text("http: {port: 9000}")

    assert load_settings(file, {"STEPSERVE_CONFIG": "/nowhere"}).http.port == 9000


def test_this_process_is_the_environment_by_default(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("STEPSERVE_HTTP__PORT", "9002")

    assert load_settings().http.port == 9002
    assert Settings().http.port == 8000


@pytest.mark.parametrize("content", ["", "# nothing\n", "http:\nmodels:\ndefault_model:\n"])
def test_empty_sections_mean_defaults(file: Path, content: str):
    file.write_text(content)

    assert load_settings(file, {}) == Settings()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("htpp: {}", "htpp: unknown key; did you mean 'http'?"),
        (
            "models: {a: {path: x, engine: {max_waiting_pictures: 8}}}",
            "this setting is now called 'models.a.engine.max_pending_images'",
        ),
        ("http: {prot: 1}", "http.prot: unknown key; did you mean 'http.port'?"),
        (
            "models: {a: {engine: {max_row: 1}}}",
            "models.a.engine.max_row: unknown key; did you mean 'models.a.engine.max_rows'?",
        ),
        (
            "models: {a: {controls: {depth: {path: x, preprocesor: grey}}}}",
            "did you mean 'models.a.controls.depth.preprocessor'?",
        ),
        (
            "models: {a: {ip_adapters: {style: {path: x, weigt_name: y}}}}",
            "did you mean 'models.a.ip_adapters.style.weight_name'?",
        ),
        ("models: {engine: {replcas: 1}}", "did you mean 'models.engine.replicas'?"),
        ("http: {colour: 1}", "http.colour: unknown key"),
        ("http: {port: x}", "http.port: Input should be a valid integer"),
        ("http: {port: 65536}", "http.port: Input should be less than or equal to 65535"),
        ("http: {port: true}", "http.port: must be a number, not true or false"),
        (
            "http: {request_timeout_s: 0}",
            "http.request_timeout_s: Input should be greater than or equal to 0.001",
        ),
        ("http: {request_timeout_s: .inf}", "http.request_timeout_s: Input should be a finite"),
        (
            "http: {max_bodies_bytes: 1000000}",
            "http: max_bodies_bytes is 1000000, less than one body may have (20971520)",
        ),
        ("http: 5", "http: Input should be a valid dictionary"),
        ("models: {}", "models: Dictionary should have at least 1 item"),
        ("models: [a]", "models: Input should be a valid dictionary"),
        ("models: {a/b: {}}", "models.a/b"),
        (f"models: {{{'x' * 65}: {{}}}}", "should match pattern"),
        ("models: {a: {dtype: int8}}", "models.a.dtype: Input should be 'bfloat16'"),
        ("models: {a: {device: gpu}}", "models.a.device: String should match pattern"),
        ("models: {a: {path: ''}}", "models.a.path: String should have at least 1 character"),
        ("models: {a: {replicas: 0}}", "models.a.replicas: Input should be greater than or equal"),
        ("models: {a: {num_gpus: -1}}", "models.a.num_gpus: Input should be greater than or equal"),
        ("models: {a: {engine: {niceness: 20}}}", "models.a.engine.niceness: Input should be less"),
        ("models: {a: {engine: {threads: 0}}}", "models.a.engine.threads: Input should be greater"),
        (
            "default_model: emji",
            "default_model: no model 'emji' among emoji; did you mean 'emoji'?, got 'emji'",
        ),
    ],
)
def test_wrong_file(file: Path, content: str, problem: str):
    file.write_text(content)
    message = problems_of(file)

    assert problem in message
    assert str(file) in message


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        (
            "STEPSERVE_MODELS__EMOJI__ENGINE__MAX_WAITING_PICTURES",
            "this variable is now called 'STEPSERVE_MODELS__EMOJI__ENGINE__MAX_PENDING_IMAGES'",
        ),
        ("STEPSERVE_HTTP__PROT", "unknown variable; did you mean 'STEPSERVE_HTTP__PORT'?"),
        ("STEPSERVE_HTTP_PORT", "unknown variable; did you mean 'STEPSERVE_HTTP__PORT'?"),
        ("STEPSERVE_HTTP", "unknown variable"),
        (
            "STEPSERVE_MODELS__EMJI__REPLICAS",
            "unknown variable; did you mean 'STEPSERVE_MODELS__EMOJI__REPLICAS'?",
        ),
        ("STEPSERVE_ZZZ", "unknown variable"),
        ("STEPSERVE_PORT", "unknown variable"),
    ],
)
def test_unknown_variable(name: str, problem: str):
    assert f"{name}: {problem}" in problems_of(None, {name: "1"})


def test_wrong_value_of_a_variable_is_told_by_its_name():
    message = problems_of(None, {"STEPSERVE_HTTP__PORT": "many"})

    assert "STEPSERVE_HTTP__PORT: Input should be a valid integer" in message
    assert "'many'" in message


def test_all_problems_at_once(file: Path):
    file.write_text("http: {port: x, prot: 1}\nmodels: {a: {replicas: 0}}\n")
    message = problems_of(file, {"STEPSERVE_X": "1", "STEPSERVE_MODELS__A__DTYPE": "int8"})

    for part in ("http.port", "http.prot", "replicas", "STEPSERVE_X", "STEPSERVE_MODELS__A__DTYPE"):
        assert part in message
    assert len(message.splitlines()) == 6


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("STEPSERVE_SERVICE_HOST", "10.0.0.1"),
        ("STEPSERVE_SERVICE_PORT_HTTP", "8000"),
        ("STEPSERVE_PORT", "tcp://10.0.0.1:8000"),
        ("STEPSERVE_PORT_8000_TCP", "tcp://10.0.0.1:8000"),
        ("STEPSERVE_PORT_8000_TCP_ADDR", "10.0.0.1"),
        ("STEPSERVE_HEAD_SVC_SERVICE_HOST", "10.0.0.1"),
        ("STEPSERVE_HEAD_SVC_PORT_8265_TCP_PROTO", "tcp"),
        ("OTHER_VARIABLE", "1"),
        ("stepserve_http__port", "1"),
    ],
)
def test_variables_that_are_not_ours(name: str, value: str):
    assert load_settings(None, {name: value}) == Settings()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("a: [", "is not valid YAML"),
        ("- a", "must hold keys and values, not a list"),
        ("text", "must hold keys and values, not a str"),
        (b"\xff\xfe\x00", "cannot read"),
    ],
)
def test_unreadable_file(file: Path, content: str | bytes, problem: str):
    file.write_bytes(content if isinstance(content, bytes) else content.encode())

    assert problem in problems_of(file)


def test_missing_file(file: Path):
    assert f"cannot read {file}" in problems_of(file)


def test_settings_are_frozen():
    with pytest.raises(ValidationError):
        Settings().http.port = 1


def test_describe_is_a_file_of_the_same_settings(file: Path):
    environ = {"STEPSERVE_MODELS__SDXL__PATH": "/x", "STEPSERVE_DEFAULT_MODEL": "sdxl"}
    settings = load_settings(None, environ)
    file.write_text(settings.describe())

    assert load_settings(file, {}) == settings
    assert yaml.safe_load(settings.describe())["models"]["sdxl"]["engine"]["max_rows"] is None


def test_the_environment_does_not_change_the_files_tree(file: Path):
    file.write_text("models: {a: &shared {replicas: 1}, b: *shared}\n")
    settings = load_settings(file, {"STEPSERVE_MODELS__A__REPLICAS": "2"})

    assert (settings.models["a"].replicas, settings.models["b"].replicas) == (2, 1)


def test_knobs_for_speed_and_memory(file: Path):
    file.write_text(
        "models: {a: {compile: yes, channels_last: false, quantization: int8, vae_tiling: true,"
        " attention_backend: native, cpu_offload: model, prompt_cache_bytes: 0}}\n"
    )
    model = load_settings(file, {"STEPSERVE_MODELS__A__VAE_SLICING": "true"}).models["a"]

    assert (model.compile, model.channels_last, model.quantization) == (True, False, "int8")
    assert (model.vae_slicing, model.vae_tiling, model.cpu_offload) == (True, True, "model")
    assert (model.attention_backend, model.prompt_cache_bytes) == ("native", 0)
    assert ModelSettings().channels_last is None


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{attention_backend: nativ}", "did you mean 'native'?"),
        ("{attention_backend: flash_hub}", "is none of native"),
        ("{quantization: int3}", "models.a.quantization: Input should be 'none', 'int8'"),
        ("{cpu_offload: yes}", "models.a.cpu_offload: Input should be 'none', 'model'"),
        ("{compil: true}", "unknown key; did you mean 'models.a.compile'?"),
        ("{prompt_cache_bytes: -1}", "greater than or equal to 0"),
    ],
)
def test_wrong_knobs(file: Path, content: str, problem: str):
    file.write_text(f"models: {{a: {content}}}")

    assert problem in problems_of(file)


def test_aliases(file: Path):
    file.write_text("models: {a: {aliases: [gpt-image-1, dall-e-3]}, b: {}}")
    settings = load_settings(file, {"STEPSERVE_MODELS__B__ALIASES": "flux, x-1"})

    assert settings.models["a"].aliases == ("gpt-image-1", "dall-e-3")
    assert settings.models["b"].aliases == ("flux", "x-1")
    found = [settings.model_id(name) for name in ("a", "dall-e-3", "x-1", "gpt")]
    assert found == ["a", "a", "b", None]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{a: {aliases: [b]}, b: {}}", "alias 'b' of 'a' is a model's id; names are unique"),
        ("{a: {aliases: [a]}}", "alias 'a' of 'a' is a model's id"),
        ("{a: {aliases: [x]}, b: {aliases: [x]}}", "alias 'x' of 'b' is of 'a', too"),
        ("{a: {aliases: [x, x]}}", "alias 'x' of 'a' is of 'a', too"),
        ("{a: {aliases: [a/b]}}", "models.a.aliases.0: String should match pattern"),
        ("{a: {alias: [x]}}", "did you mean 'models.a.aliases'?"),
    ],
)
def test_wrong_aliases(file: Path, content: str, problem: str):
    file.write_text(f"models: {content}")

    assert problem in problems_of(file)


def test_lists_are_set_by_variables_too():
    settings = load_settings(None, {"STEPSERVE_HTTP__CORS_ORIGINS": "https://a.example,http://b"})

    assert settings.http.cors_origins == ("https://a.example", "http://b")


KEY = "an-operators-own-key-of-some-length"


def test_who_may_call(file: Path):
    file.write_text(
        "http: {allow_anonymous: true, ingress_replicas: 3, cors_origins: [https://a.example]}\n"
        "auth: {keys_file: keys.yaml}\n"
    )
    settings = load_settings(file, {"STEPSERVE_AUTH__KEYS": f"app={KEY}"})

    assert (settings.auth.keys_file, settings.auth.keys) == ("keys.yaml", f"app={KEY}")
    assert (settings.http.allow_anonymous, settings.http.ingress_replicas) == (True, 3)
    assert settings.http.cors_origins == ("https://a.example",)


def test_nobody_from_elsewhere_is_let_in_by_default():
    http, uploads = Settings().http, Settings().uploads

    assert (http.host, http.allow_anonymous, http.cors_origins) == ("127.0.0.1", False, ())
    assert (Settings().auth.keys_file, Settings().auth.keys) == (None, None)
    assert uploads.urls is False
    assert (ModelSettings().trust_remote_code, ModelSettings().allow_pickle) == (False, False)


def test_secrets_are_in_no_message_and_in_no_description(file: Path):
    settings = load_settings(None, {"STEPSERVE_AUTH__KEYS": KEY, "STEPSERVE_RESULTS__SECRET": KEY})
    file.write_text(f"auth: {{keys: [{KEY}]}}\nresults: {{secret: {KEY[:3]}}}\n")
    message = problems_of(file)

    assert KEY not in settings.describe()
    assert "auth.keys: Input should be a valid string" in message
    assert "results.secret: String should have at least 16 characters" in message
    assert KEY not in message
    assert f"'{KEY[:3]}'" not in message


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("uploads: {max_pixels: 16777217}", "uploads.max_pixels: Input should be less than"),
        ("uploads: {url: true}", "did you mean 'uploads.urls'?"),
        ("http: {cors_origin: [x]}", "did you mean 'http.cors_origins'?"),
        ("http: {ingress_replicas: 0}", "http.ingress_replicas: Input should be greater than"),
        ("models: {a: {trust_remote_codes: true}}", "did you mean 'models.a.trust_remote_code'?"),
    ],
)
def test_wrong_settings_of_who_may_do_what(file: Path, content: str, problem: str):
    file.write_text(content)

    assert problem in problems_of(file)


@pytest.mark.parametrize(
    ("results", "problem"),
    [
        ("{address: s3://bucket/x}", "so secret or secret_file must be set"),
        ("{address: memory://x}", "so secret or secret_file must be set"),
        (f"{{secret: {KEY}, secret_file: x}}", "secret and secret_file are both set"),
    ],
)
def test_all_replicas_must_sign_links_alike(file: Path, results: str, problem: str):
    file.write_text(f"results: {results}\n")
    message = problems_of(file)

    assert problem in message
    assert KEY not in message


@pytest.mark.parametrize(
    "results",
    [
        {"address": "/var/results"},
        {"address": "results"},
        {"address": "file:///var/results"},
        {"address": "s3://bucket", "secret_file": "secret.txt"},
        {"address": "s3://bucket", "secret": "a secret of sixteen"},
    ],
)
def test_addresses_of_results(results: dict[str, str]):
    assert ResultSettings.model_validate(results).address == results["address"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "holds no settings"),
        ("# all gone\n", "holds no settings"),
        ("null\n", "holds no settings"),
        ("---\n...\n", "holds no settings"),
        ("models:\n", "names no models"),
        ("http: {port: 9000}\n", "names no models"),
        ("models: {}\n", "models: Dictionary should have at least 1 item"),
    ],
)
def test_a_file_without_models_is_refused_where_it_would_replace_all(
    file: Path, content: str, told: str
):
    file.write_text(content)

    with pytest.raises(ConfigError, match=told):
        load_settings(file, {}, must_name_models=True)


def test_models_may_come_from_variables_and_without_a_file(file: Path):
    file.write_text("http: {port: 9000}\n")
    added = {"STEPSERVE_MODELS__SD__PATH": "/sd"}

    assert set(load_settings(file, added, must_name_models=True).models) == {"emoji", "sd"}
    assert load_settings(None, {}, must_name_models=True) == Settings()


@pytest.mark.parametrize("content", ["a: 2026-13-45\n", "[" * 5000])
def test_whatever_yaml_raises_is_a_wrong_file(file: Path, content: str):
    file.write_text(content)

    with pytest.raises(ConfigError, match="is not valid YAML"):
        load_settings(file, {})


def test_paths_of_adapters_and_controls_that_do_not_exist_are_told(tmp_path: Path) -> None:
    there, gone = str(tmp_path), str(tmp_path / "gone")
    model = ModelSettings.model_validate(
        {
            "adapters": {"ink": gone, "oil": there},
            "controls": {"depth": gone, "edges": there},
            "ip_adapters": {"style": {"path": there, "subfolder": "gone"}},
        }
    )

    assert list(model.missing_paths()) == [
        f"adapters.ink: {gone} does not exist; correct the path",
        f"controls.depth.path: {gone} does not exist; correct the path",
        f"ip_adapters.style.path: {gone} does not exist; correct the path",
    ]
