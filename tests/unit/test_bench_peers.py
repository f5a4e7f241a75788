"""The peers of the benchmarks: each is pinned, refuses another version, and is told every engine."""

import pytest

from bench.peers import PEERS, PINS, Bare, LiteLlm, Nginx, NotInstalled, Peer

ENGINES = ["http://127.0.0.1:9000", "http://127.0.0.2:9000"]


class Found(Nginx):
    """nginx of a version that is told."""

    def __init__(self, version: str) -> None:
        self._version = version

    def version(self) -> str:
        return self._version


def test_every_peer_has_one_pinned_version():
    assert {peer.name for peer in PEERS if not isinstance(peer, Bare)} <= set(PINS)
    assert len({peer.name for peer in PEERS}) == len(PEERS)


def test_a_fix_of_the_pinned_release_is_taken_and_another_release_is_not():
    pin = PINS["nginx"]
    assert Found(f"{pin}.9").check() == f"{pin}.9"
    for other in (f"{pin}9", "1.9"):
        with pytest.raises(NotInstalled, match=other):
            Found(other).check()


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_each_peer_is_told_its_port_and_every_engine(peer: Peer, tmp_path):
    command = peer.command(8123, ENGINES, tmp_path)
    told = " ".join([*command, *(file.read_text() for file in tmp_path.iterdir())])
    assert "8123" in told
    assert all(engine.removeprefix("http://") in told for engine in ENGINES)


def test_the_key_of_litellm_is_the_one_in_its_configuration(tmp_path):
    LiteLlm().command(8123, ENGINES, tmp_path)
    assert LiteLlm.key in (tmp_path / "litellm.yaml").read_text()
