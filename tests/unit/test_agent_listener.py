"""The certificate that an agent makes for its listener: kept, private, renewed before it ends."""

import datetime
import stat

import pytest

from nodes.agent import listener
from nodes.agent.doorway import Doorway
from nodes.agent.listener import CannotListen, Listener, listener_context
from nodes.agent.reach import split_address


def test_a_certificate_is_made_once_and_only_its_owner_reads_it(tmp_path):
    file = tmp_path / "data" / "listener.pem"
    _, first = listener_context(file)
    _, again = listener_context(file)
    assert first == again
    assert len(first) == 64
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in file.parent.iterdir()] == ["listener.pem"]


@pytest.mark.parametrize(
    "text", ["", "no certificate", "-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n"]
)
def test_a_file_that_holds_none_is_replaced(tmp_path, text):
    file = tmp_path / "listener.pem"
    file.write_text(text)
    _, made = listener_context(file)
    assert listener_context(file)[1] == made


def test_one_that_ends_soon_is_replaced(tmp_path, monkeypatch):
    file = tmp_path / "listener.pem"
    monkeypatch.setattr(listener, "VALID", datetime.timedelta(days=20))
    _, old = listener_context(file)
    monkeypatch.setattr(listener, "VALID", datetime.timedelta(days=3650))
    _, new = listener_context(file)
    assert old != new


async def test_a_port_in_use_is_told_with_what_to_change(tmp_path, unused_tcp_port):
    door = Doorway({}.get)
    first, second = (Listener(door, tmp_path, "127.0.0.1", unused_tcp_port) for _ in range(2))
    await first.start()
    with pytest.raises(CannotListen, match="choose another --listen"):
        await second.start()
    first.close()


@pytest.mark.parametrize(
    ("text", "address"), [(":8443", ("", 8443)), ("[::1]:1", ("::1", 1)), ("h:80", ("h", 80))]
)
def test_addresses_are_read(text, address):
    assert split_address(text) == address


@pytest.mark.parametrize("text", ["h", "h:", "h:x", "h:99999"])
def test_what_is_no_address_is_refused(text):
    with pytest.raises(ValueError, match="HOST:PORT"):
        split_address(text)
