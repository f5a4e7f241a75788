"""May this turn begin? Asks for the model, the rate limits and the money, each from memory unless it can't be known there.

What it sets aside, a part of the limits and a hold of the wallet, is the turn's until its settlement gives back the rest.
"""

import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Protocol

from billing.holds import (
    SHAPES,
    Bound,
    UnpricedMedia,
    bound_of,
    clamped_tokens,
    hold_nano,
    least_nano,
    limit_tokens,
)
from billing.leases import BillingUnavailable, BudgetExceeded, Hold, InsufficientFunds, SpendLeases
from billing.limits import Admission as Quota
from billing.limits import Limiter, LimitExceeded
from billing.prices import Price, PriceBook
from config.clock import Clock
from config.defaults import Settings
from gateway import errors
from gateway.errors import (
    ApiError,
    BadRequest,
    InsufficientQuota,
    ModelNotFound,
    NoNodeAvailable,
    RateLimited,
    Unavailable,
)
from gateway.identity.keyring import Principal
from gateway.placement import NO_NODE_RETRY_AFTER_S
from gateway.starting import ModelNotLoaded, ModelStarts
from gateway.turn import Ask, Turn
from nodes.registry import Registry
from nodes.routing.router import Need, NoEngine, choose
from nodes.routing.snapshot import Engine, Group

CLAMPED = "x-poolgate-max-tokens"
"""Header that tells the token limit which a request without one got, because its wallet buys no more."""

BILLING_RETRY_AFTER_S = 2

COUNTS_AT_ONCE_MAX = 8
"""Prompts that engines count for one worker at a time: refused requests must not keep engines busy."""

CountPrompt = Callable[[Ask, Engine], Awaitable[int | None]]


class Room(Protocol):
    """The journal, as far as admission asks it."""

    @property
    def is_full(self) -> bool:
        """Whether new turns must be refused, since their records might find no room."""
        ...


@dataclass(slots=True)
class Funding:
    """What a turn needs at most, and what it got."""

    price: Price
    bound: Bound
    percent: int
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def amount_nano(self) -> int:
        return hold_nano(self.price, self.bound, self.percent)


class Admission:
    """Admits turns. `journal` must have room for them; `count_prompt` asks an engine how long a prompt is."""

    def __init__(
        self,
        settings: Settings,
        *,
        registry: Registry,
        prices: PriceBook,
        clock: Clock,
        limiter: Limiter,
        leases: SpendLeases,
        journal: Room,
        count_prompt: CountPrompt,
        starts: ModelStarts,
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._prices = prices
        self._now = clock.now
        self._limiter = limiter
        self._leases = leases
        self._journal = journal
        self._count_prompt = count_prompt
        self._starts = starts
        self._counting = 0
        self._rng = random.Random()  # noqa: S311 - spreads load, keeps no secret

    def try_admit(self, ask: Ask, principal: Principal, request_id: str) -> Turn | None:
        """The turn, if memory alone can tell that it may begin; None: `admit` may find a way. Raises ApiError."""
        model: str = ask.body["model"]
        try:
            group = self._group(ask, model, principal)
        except ModelNotLoaded:
            return None
        now = self._now()
        price = self._prices.price(model, now)
        bound = self._bound(ask, group, price)
        amount_nano = hold_nano(price, bound, ask.price_percent)
        hold = self._leases.try_hold(principal.account_id, amount_nano, principal.budgets)
        if hold is None:
            return None
        quota = self._limiter.try_admit(principal.subjects, limit_tokens(bound))
        if quota is None:
            hold.void()
            return None
        return Turn(request_id, principal, ask, model, price, bound, hold, quota, now, quota.headers)

    async def admit(self, ask: Ask, principal: Principal, request_id: str) -> Turn:
        """The turn with its quota and its hold. Raises ApiError, and has then set nothing aside."""
        model: str = ask.body["model"]
        group: Group | None = None
        with suppress(ModelNotLoaded):
            group = self._group(ask, model, principal)
        if group is None:
            await self._starts.wait(model)
            group = self._group(ask, model, principal)
        now = self._now()
        price = self._prices.price(model, now)
        funding = Funding(price, self._bound(ask, group, price), ask.price_percent)
        quota = await self._quota(principal, limit_tokens(funding.bound))
        try:
            hold = self._leases.try_hold(principal.account_id, funding.amount_nano, principal.budgets)
            if hold is None:
                hold = await self._hold(ask, principal, funding, group)
        except BaseException as error:
            quota.end(0)
            if isinstance(error, ApiError):
                error.headers |= quota.headers
            raise
        told = quota.headers.with_more(funding.headers) if funding.headers else quota.headers
        return Turn(request_id, principal, ask, model, price, funding.bound, hold, quota, now, told)

    def _group(self, ask: Ask, model: str, principal: Principal) -> Group:
        """The engines that may serve it. Raises ModelNotFound, NoNodeAvailable for a model that is only priced,
        ModelNotLoaded if a node has it on disk, and Unavailable while no more turns can be journaled."""
        if principal.models is not None and model not in principal.models:
            raise ModelNotFound(param="model")
        snapshot = self._registry.snapshot
        group = snapshot.group(model, ask.kind, None)
        if group is not None:
            if self._journal.is_full:
                raise Unavailable(retry_after_s=NO_NODE_RETRY_AFTER_S)
            return group
        if model in snapshot.by_model:
            raise ModelNotFound(f"The model can't be used with {ask.route}.", param="model")
        if model not in self._prices.models():
            raise ModelNotFound(param="model")
        if self._starts.can_start(model):
            raise ModelNotLoaded(retry_after_s=NO_NODE_RETRY_AFTER_S)
        raise NoNodeAvailable(retry_after_s=NO_NODE_RETRY_AFTER_S)

    def _bound(self, ask: Ask, group: Group, price: Price) -> Bound:
        shape = SHAPES[ask.engine_path]
        try:
            return bound_of(ask.body, ask.body_bytes, shape, price, group.context_max, self._settings)
        except UnpricedMedia as error:
            raise BadRequest(str(error)) from None

    async def _quota(self, principal: Principal, tokens: int) -> Quota:
        quota = self._limiter.try_admit(principal.subjects, tokens)
        if quota is not None:
            return quota
        try:
            return await self._limiter.admit(principal.subjects, tokens)
        except LimitExceeded as error:
            raise RateLimited(str(error), retry_after_s=error.retry_after_s, headers=error.headers) from None

    async def _hold(self, ask: Ask, principal: Principal, funding: Funding, group: Group) -> Hold:
        """A hold that memory did not have: of a refilled lease, of a prompt counted exactly, or a smaller one."""
        lacking: InsufficientFunds | BudgetExceeded
        try:
            try:
                return await self._leased(ask, principal, funding, group)
            except (InsufficientFunds, BudgetExceeded) as error:
                lacking = error
            above_nano = lacking.above_nano if isinstance(lacking, InsufficientFunds) else None
            if not await self._is_shorter(ask, funding, above_nano):
                raise lacking
            return await self._leased(ask, principal, funding, group)
        except InsufficientFunds:
            raise InsufficientQuota from None
        except BudgetExceeded as error:
            raise errors.BudgetExceeded(str(error)) from None
        except BillingUnavailable:
            raise errors.BillingUnavailable(retry_after_s=BILLING_RETRY_AFTER_S) from None

    async def _leased(self, ask: Ask, principal: Principal, funding: Funding, group: Group) -> Hold:
        """A hold of the amount; less is of use to a request that names no token limit, which is then given one."""
        price, bound, percent = funding.price, funding.bound, funding.percent
        least = None
        if not bound.is_limited and ask.limit_field is not None:
            # An engine refuses a limit below the least that the request wants.
            tokens_min = max(self._settings.clamp_tokens_min, ask.body.get("min_tokens", 0))
            least = least_nano(price, bound, tokens_min, percent)
        amount_nano = funding.amount_nano
        hold = await self._leases.hold(principal.account_id, amount_nano, principal.budgets, least_nano=least)
        if hold.amount_nano < amount_nano:
            assert ask.limit_field is not None
            tokens = clamped_tokens(price, bound.prompt_tokens, bound.choices, hold.amount_nano, percent)
            # ... and one above its own context, which it would have kept to by itself.
            tokens = min(tokens, group.context_min or tokens)
            ask.body[ask.limit_field] = tokens
            funding.bound = replace(bound, output_tokens=tokens, is_limited=True)
            funding.headers[CLAMPED] = str(tokens)
        return hold

    async def _is_shorter(self, ask: Ask, funding: Funding, above_nano: int | None) -> bool:
        """Have an engine count the prompt, whose bytes are several times its tokens: does the turn need less than that?

        `above_nano`: all there is. Engines are spared where that would not do for a prompt of one token either, and where
        several prompts are being counted.
        """
        bound = replace(funding.bound, prompt_tokens=1)
        output = bound.output_tokens if bound.is_limited else self._settings.clamp_tokens_min
        at_least = hold_nano(funding.price, bound, funding.percent, output_tokens=output)
        if above_nano is not None and at_least > above_nano:
            return False
        if bound.has_media or self._counting >= COUNTS_AT_ONCE_MAX:
            return False
        settings, need = self._settings, Need(ask.body["model"], ask.kind, 0, ask.provider_id)
        try:  # one that may get the turn: nobody else sees its prompt
            engine = choose(
                self._registry.snapshot, need, sample=settings.choice_sample,
                turns_max=settings.engine_turns_max, rng=self._rng,
            )  # fmt: skip
        except NoEngine:
            return False
        self._counting += 1
        try:
            tokens = await self._count_prompt(ask, engine)
        finally:
            self._counting -= 1
        if tokens is None or tokens >= funding.bound.prompt_tokens:
            return False
        funding.bound = replace(funding.bound, prompt_tokens=tokens)
        return True
