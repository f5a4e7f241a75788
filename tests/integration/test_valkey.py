"""The Valkey client's bounds, against real servers that are paused or gone."""

import asyncio
import os
import signal
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as ValkeyGone
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as ValkeyTimeout

from config.embedded import EmbeddedStores
from config.valkey import CONNECTIONS_MAX, is_up, open_valkey
from tests.waiting import eventually


async def test_a_paused_server_times_out_and_works_again_when_it_goes_on(private_stores: EmbeddedStores):
    async with open_valkey(private_stores.redis_url, timeout_s=0.1) as valkey:
        await valkey.set("n", 1)
        os.kill(private_stores.pids["valkey"], signal.SIGSTOP)
        with pytest.raises(ValkeyTimeout):
            await valkey.get("n")
        with pytest.raises(RedisError):  # a new connection, whose greeting is not answered
            await valkey.get("n")
        assert not await is_up(valkey)
        os.kill(private_stores.pids["valkey"], signal.SIGCONT)
        await eventually(lambda: is_up(valkey))
        assert await valkey.get("n") == b"1"


async def test_a_late_answer_is_not_taken_for_another_ones(private_stores: EmbeddedStores):
    async with open_valkey(private_stores.redis_url, timeout_s=0.1) as valkey:
        await valkey.set("old", "old")
        await valkey.set("new", "new")
        os.kill(private_stores.pids["valkey"], signal.SIGSTOP)
        with pytest.raises(ValkeyTimeout):
            await valkey.get("old")
        os.kill(private_stores.pids["valkey"], signal.SIGCONT)
        await eventually(lambda: is_up(valkey))
        assert await valkey.get("new") == b"new"


async def test_a_server_that_is_gone_is_said_and_found_again(private_stores: EmbeddedStores):
    async with open_valkey(private_stores.redis_url, timeout_s=5) as valkey:
        assert await is_up(valkey)
        os.kill(private_stores.pids["valkey"], signal.SIGKILL)
        await eventually(private_stores.poll)
        with pytest.raises(ValkeyGone):
            await valkey.get("n")
        private_stores.restart("valkey")
        assert await is_up(valkey)


async def test_nothing_is_asked_before_the_first_command(tmp_path: Path):
    async with open_valkey(f"unix://{tmp_path}/none.sock", timeout_s=0.1) as valkey:
        assert not await is_up(valkey)


async def test_more_commands_than_connections_wait_their_turn(valkey: Redis):
    answers = await asyncio.gather(*(valkey.incr("n") for _ in range(20 * CONNECTIONS_MAX)))
    assert sorted(answers) == list(range(1, 20 * CONNECTIONS_MAX + 1))


async def test_each_test_finds_it_empty(valkey: Redis):
    assert await valkey.dbsize() == 0
