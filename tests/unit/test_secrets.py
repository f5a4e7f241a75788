"""Key secrets: made, hashed, shown in part, and the pepper they are hashed with."""

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from config.defaults import Settings
from gateway.identity.secrets import check_secret, display_prefix, hash_secret, load_pepper, new_secret


def test_a_new_secret_is_its_prefix_and_48_hex_digits_and_never_the_same() -> None:
    first, second = new_secret("sk-pg-"), new_secret("sk-pg-")
    assert first.startswith("sk-pg-")
    assert len(bytes.fromhex(first.removeprefix("sk-pg-"))) == 24
    assert first != second


def test_a_hash_depends_on_secret_and_pepper() -> None:
    hashes = {hash_secret(pepper, secret) for pepper in (b"a", b"b") for secret in ("x", "y")}
    assert len(hashes) == 4
    assert {len(digest) for digest in hashes} == {32}


def test_bytes_that_are_no_text_can_be_hashed() -> None:
    assert hash_secret(b"p", b"\xff\xfe".decode("utf-8", "surrogateescape")) != hash_secret(b"p", "\ud800")


@pytest.mark.parametrize(
    ("secret", "shown"),
    [
        ("sk-pg-" + "a1" * 24, "sk-pg-a1a1a1"), ("dc1-provider-" + "b" * 48, "dc1-provider-bbbbbb"),
        ("sk_alpha_" + "c" * 24, "sk_alpha_cccccc"), ("my-own-secret", "my-"), ("abcdefgh", "ab"),
    ],
)  # fmt: skip
def test_only_the_start_of_a_secret_is_shown(secret: str, shown: str) -> None:
    assert display_prefix(secret) == shown


@pytest.mark.parametrize("secret", ["", "short", "with space", "tab\tinside", "x" * 513, "schlüssel-lang"])
def test_a_secret_that_does_not_fit_a_header_is_refused_without_being_told(secret: str) -> None:
    with pytest.raises(ValueError, match="printable ASCII") as refused:
        check_secret(secret)
    assert not secret or secret not in str(refused.value)


def test_a_pepper_is_made_once_for_its_owner_only(tmp_path: Path) -> None:
    settings = Settings(data_dir=str(tmp_path / "data"))
    first = load_pepper(settings)
    assert load_pepper(settings) == first
    assert len(first) == 64
    file = tmp_path / "data" / "pepper"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in file.parent.iterdir()] == ["pepper"]


def test_processes_that_start_at_once_get_one_pepper(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        peppers = set(threads.map(lambda _: load_pepper(Settings(data_dir=str(tmp_path))), range(32)))
    assert len(peppers) == 1


def test_the_setting_goes_before_the_file(tmp_path: Path) -> None:
    settings = Settings(data_dir=str(tmp_path), key_pepper="0123456789abcdef")
    assert load_pepper(settings) == b"0123456789abcdef"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "tiny"])
def test_a_pepper_that_was_cut_short_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "pepper").write_text(text)
    with pytest.raises(ValueError, match="16 characters"):
        load_pepper(Settings(data_dir=str(tmp_path)))
