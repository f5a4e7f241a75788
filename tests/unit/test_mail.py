"""Whatever address a provider may register with, a mail can be made for it, and it has one recipient."""

import re
from email import message_from_bytes
from email.policy import default
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config.settings import BadSetting, load_settings
from gateway.api.provider.asking import EMAIL
from gateway.mail import FolderMailer, SmtpMailer, _message, mailer_of


@settings(derandomize=True, database=None, deadline=None)
@given(st.from_regex(EMAIL, fullmatch=True).filter(lambda text: len(text) <= 254))
def test_an_address_that_is_taken_can_be_written_to(address: str) -> None:
    content = _message("gpu@example.com", address, "Your code", "Code: 12345678\n").as_bytes()
    read = message_from_bytes(content, policy=default)
    assert [each.addr_spec for each in read["To"].addresses] == [address]
    assert read.get_content() == "Code: 12345678\n"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "a@",
        "@b",
        "a@b\r\nBcc: c@d",
        "a b@c",
        "a@b,c@d",
        '"a"@b',
        "a@b@c",
        "<a@b>",
        "\u00e9@b.c",
        "a@b\n",
    ],
)
def test_what_is_no_address_is_not_taken(text: str) -> None:
    assert EMAIL.fullmatch(text) is None


async def test_a_mail_in_the_folder_is_whole_and_nobody_elses(tmp_path: Path) -> None:
    await FolderMailer(tmp_path / "mail", "gpu@example.com").send("a@b.c", "Subject", "Text")
    (file,) = (tmp_path / "mail").iterdir()
    assert file.suffix == ".eml"
    assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)


def test_a_password_is_shown_by_nothing() -> None:
    mailer = mailer_of(load_settings(environ={}, mail_url="smtp://me:p%40ss@mail.example.com"))
    assert isinstance(mailer, SmtpMailer)
    assert repr(mailer) == "<SmtpMailer mail.example.com:587>"
    assert (mailer._user, mailer._password, mailer._starts_tls) == ("me", "p@ss", True)


@pytest.mark.parametrize("url", ["mail.example.com", "http://x", "smtp://", "smtp://a/b", "smtp://h:x"])
def test_a_mail_server_that_is_none_is_refused_at_the_start(url: str) -> None:
    with pytest.raises(BadSetting, match=re.escape("mail_url = (hidden)")):
        load_settings(environ={}, mail_url=url)


def test_without_a_server_mail_goes_to_a_folder_in_developer_mode_and_nowhere_else() -> None:
    assert mailer_of(load_settings(environ={})) is None
    assert isinstance(mailer_of(load_settings(environ={}, developer_mode=True)), FolderMailer)
