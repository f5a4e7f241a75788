"""Login by e-mail: a one-time code goes to the address of a provider, and whoever brings it back gets a key (decision 6).

Codes are stored hashed, expire, and bear few tries. Whether an address is known shows in no answer and in no time that
one takes: the caller only puts it into a queue.
"""

import asyncio
import hmac
import logging
import secrets

import asyncpg

from config.defaults import Settings
from config.postgres import AWAY
from gateway.identity.secrets import hash_secret
from gateway.mail import Mailer, MailFailed

log = logging.getLogger("poolgate.identity")

CODE_DIGITS = 8
TRIES = 5
"""With a code of 8 digits and 5 codes an hour, somebody who guesses for a year gets in with a chance of 1 in 450."""

CODES_HOUR = 5
"""Codes mailed to one address in an hour: nobody's mailbox is flooded, and guesses stay few."""

QUEUE_MAX = 256
"""Addresses that wait to be looked up; past it everybody is told to come again."""

SUBJECT = "Your code"
TEXT = """\
Somebody, hopefully you, asked for a new API key for the GPU provider of this address.

Code: {code}

It works once, for {minutes:g} minutes. Send it with your address to /api/providers/login-email:

    {{"email": "...", "code": "{code}"}}

Keys that you have stay valid. If it was not you, there is nothing to do.
"""

FIND = "select account_id from providers where email = $1"

MAKE = """
insert into login_codes as c (account_id, digest, expires_at, tries_left)
values ($1, $2, clock_timestamp() + make_interval(secs => $3), $4)
on conflict (account_id) do update set
    digest = excluded.digest, expires_at = excluded.expires_at, tries_left = excluded.tries_left,
    sent = case when c.window_at < clock_timestamp() - interval '1 hour' then 1 else c.sent + 1 end,
    window_at = case
        when c.window_at < clock_timestamp() - interval '1 hour' then clock_timestamp() else c.window_at end
where c.window_at < clock_timestamp() - interval '1 hour' or c.sent < $5
returning true
"""

TRY = """
update login_codes set tries_left = tries_left - 1
where account_id = (select account_id from providers where email = $1)
  and expires_at > clock_timestamp() and tries_left > 0
returning account_id, digest
"""

# The row stays, spent, so that the codes of this hour remain counted.
SPEND = """
update login_codes set tries_left = 0, expires_at = clock_timestamp() where account_id = $1 and digest = $2
and expires_at > clock_timestamp() returning true
"""


class WrongCode(Exception):
    """No such address, or the code is wrong, was used, has expired, or was tried too often."""


class QueueFull(Exception):
    """Too many addresses wait."""


class Logins:
    """Makes codes, mails them, and takes them back."""

    def __init__(self, pool: asyncpg.Pool, pepper: bytes, mailer: Mailer, settings: Settings) -> None:
        self._pool = pool
        self._pepper = pepper
        self._mailer = mailer
        self._code_s = settings.login_code_s
        self._waiting: asyncio.Queue[str] = asyncio.Queue(QUEUE_MAX)

    def ask(self, email: str) -> None:
        """Mail a code to `email` soon, if a provider has it. Raises QueueFull."""
        try:
            self._waiting.put_nowait(email)
        except asyncio.QueueFull:
            raise QueueFull from None

    @property
    def waiting(self) -> int:
        """Addresses that were not looked at yet."""
        return self._waiting.qsize()

    async def run(self) -> None:
        """Mail codes until cancelled."""
        while True:
            email = await self._waiting.get()
            try:
                await self._answer(email)
            except (MailFailed, *AWAY) as error:
                log.warning(
                    "a login code could not be mailed: %s", error or type(error).__name__,
                    extra={"action": "mail_failed"},
                )  # fmt: skip

    async def redeem(self, email: str, code: str) -> int:
        """The account whose code it is; it works once. Raises WrongCode."""
        row = await self._pool.fetchrow(TRY, email)
        if row is None:
            raise WrongCode
        if not hmac.compare_digest(row["digest"], self._digest(row["account_id"], code)):
            raise WrongCode
        if not await self._pool.fetchval(SPEND, row["account_id"], row["digest"]):
            raise WrongCode
        return int(row["account_id"])

    async def _answer(self, email: str) -> None:
        account_id = await self._pool.fetchval(FIND, email)
        if account_id is None:
            return
        code = f"{secrets.randbelow(10**CODE_DIGITS):0{CODE_DIGITS}}"
        digest = self._digest(account_id, code)
        if not await self._pool.fetchval(MAKE, account_id, digest, self._code_s, TRIES, CODES_HOUR):
            log.info(
                "no more login codes for this account within the hour",
                extra={"action": "login_codes_bounded", "account_id": account_id},
            )
            return
        await self._mailer.send(email, SUBJECT, TEXT.format(code=code, minutes=self._code_s / 60))

    def _digest(self, account_id: int, code: str) -> bytes:
        return hash_secret(self._pepper, f"login:{account_id}:{code}")
