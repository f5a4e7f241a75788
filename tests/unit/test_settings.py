"""What load_settings takes, in which order, and how it refuses the rest."""

import dataclasses
from pathlib import Path

import pytest

from config.defaults import Settings
from config.settings import BadSetting, allowed, load_settings, markdown

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


def refusal(file: Path | None = None, environ: dict[str, str] | None = None, **overrides: object) -> str:
    with pytest.raises(BadSetting) as refused:
        load_settings(file, environ or {}, **overrides)
    return str(refused.value)


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    return tmp_path / "poolgate.toml"


def test_defaults_pass_every_check_of_their_own():
    assert load_settings(environ={}) == Settings()


def test_every_default_keeps_its_own_bounds():
    given = {knob.name: knob.default for knob in dataclasses.fields(Settings)}
    assert load_settings(environ={}, **given) == Settings()


def test_every_setting_says_what_it_is_and_what_it_allows():
    for knob in dataclasses.fields(Settings):
        assert knob.metadata["why"]
        assert allowed(knob)


def test_settings_can_not_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_settings(environ={}).port = 1


def test_later_sources_win(toml: Path):
    toml.write_text('port = 1001\nworkers = 2\nhost = "10.0.0.1"\n')
    settings = load_settings(toml, {"POOLGATE_PORT": "1002", "POOLGATE_WORKERS": "3"}, port=1003)
    assert (settings.host, settings.workers, settings.port) == ("10.0.0.1", 3, 1003)


def test_an_option_that_was_not_given_changes_nothing():
    assert load_settings(environ={"POOLGATE_PORT": "1002"}, port=None).port == 1002


def test_the_file_can_be_named_by_a_variable(toml: Path):
    toml.write_text("port = 1001\n")
    assert load_settings(environ={"POOLGATE_CONFIG": str(toml)}).port == 1001


def test_a_variable_that_is_no_setting_is_left_alone():
    assert load_settings(environ={"POOLGATE_COMPILED": "0"}) == Settings()


def test_plain_store_variables_are_taken_and_the_prefixed_ones_win():
    environ = {
        "DATABASE_URL": "postgresql://a/x",
        "REDIS_URL": "redis://a/0",
        "POOLGATE_REDIS_URL": "redis://b/0",
    }
    settings = load_settings(environ=environ)
    assert (settings.database_url, settings.redis_url) == ("postgresql://a/x", "redis://b/0")


def test_other_variables_are_left_alone():
    assert (
        load_settings(environ={"PATH": "/bin", "POOLGATE_PARENT_FD": "7", "POOLGATE_URL": "x"}) == Settings()
    )


def test_a_whole_number_does_for_a_number(toml: Path):
    toml.write_text("shutdown_grace_s = 5\n")
    grace_s = load_settings(toml, {}).shutdown_grace_s
    assert grace_s == 5.0
    assert isinstance(grace_s, float)


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("port", "0", "a whole number from 1 to 65535"),
        ("port", "65536", "a whole number from 1 to 65535"),
        ("port", "http", "a whole number from 1 to 65535"),
        ("port", "80.5", "a whole number from 1 to 65535"),
        ("port", "", "a whole number from 1 to 65535"),
        ("breaker_open_s", "nan", "a number from 0.01 to 600 (seconds)"),
        ("breaker_open_s", "inf", "a number from 0.01 to 600 (seconds)"),
        ("log_format", "xml", "human or json"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_with_name_value_and_what_is(
    name: str, text: str, wanted: str
):
    said = refusal(environ={f"POOLGATE_{name.upper()}": text})
    assert f"{name} = {text!r}" in said or f"{name} = {text}" in said
    assert f"POOLGATE_{name.upper()}" in said
    assert wanted in said


@pytest.mark.parametrize(
    "line", ['port = "8080"', "port = 80.0", "port = true", "host = 1", "[gateway]\nport = 1"]
)
def test_a_file_must_use_the_right_type(toml: Path, line: str):
    toml.write_text(line)
    assert "port" in (said := refusal(toml)) or "host" in said or "gateway" in said


def test_an_unknown_name_in_the_file_is_refused_with_what_was_meant(toml: Path):
    toml.write_text("hearbeat_grace_s = 3\n")
    said = refusal(toml)
    assert "hearbeat_grace_s" in said
    assert str(toml) in said
    assert "did you mean heartbeat_grace_s?" in said


def test_an_unknown_variable_is_refused_with_what_was_meant():
    assert "did you mean POOLGATE_WORKERS?" in refusal(environ={"POOLGATE_WORKER": "2"})


def test_an_unknown_option_is_refused():
    assert "not a setting" in refusal(zzz=1)


def test_a_file_that_is_missing_or_no_toml_is_refused_by_name(toml: Path):
    assert f"{toml} can't be read" in refusal(toml)
    toml.write_text("port = = 1")
    assert f"{toml} is not TOML" in refusal(toml)


@pytest.mark.parametrize("url", ["mysql://me:hunter2@db/x", "hunter2"])
def test_a_secret_value_is_never_shown(url: str):
    for said in (refusal(environ={"DATABASE_URL": url}), refusal(redis_url=url)):
        assert "hunter2" not in said
        assert "hidden" in said


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"heartbeat_grace_s": 30}, "heartbeat_interval_s (30)"),
        ({"breaker_open_max_s": 0.5}, "breaker_open_s (1)"),
        ({"engine_restart_max_s": 0.5}, "engine_restart_s (1)"),
        ({"journal_bytes_max": 2**20}, "journal_segment_bytes (16777216)"),
        ({"complete_tokens_max": 100}, "default_model_tokens (512)"),
        ({"minor_per_major": 7}, "divide 1000000000"),
        ({"currency": "sar"}, "three capital letters"),
        ({"node_networks": "10.0.0.1/8"}, "10.0.0.0/8"),
        ({"node_networks": "everywhere"}, "10.0.0.0/8"),
        ({"host": ""}, "an address"),
        ({"tls_certificate": "chain.pem"}, "both, or neither"),
        ({"tls_key": "key.pem"}, "both, or neither"),
        ({"data_dir": ""}, "a folder"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(overrides: dict[str, object], words: str):
    said = refusal(**overrides)
    assert next(iter(overrides)) in said or "tls_key" in said
    assert words in said


def test_equal_pauses_are_fine():
    assert load_settings(environ={}, breaker_open_s=2, breaker_open_max_s=2).breaker_open_max_s == 2


def test_the_settings_page_is_current():
    assert PAGE.read_text() == "\n".join(markdown()) + "\n", (
        "python -m config.settings --markdown > docs/settings.md"
    )
