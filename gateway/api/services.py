"""What handlers need, under typed keys: put into the application by `gateway.app`, read by `gateway.api`."""

from aiohttp import web
from redis.asyncio import Redis

from billing.prices import PriceBook
from config.defaults import Settings
from config.metrics import Metrics
from gateway.control import ControlHub
from gateway.edge.cors import Cors
from gateway.edge.refused import RefusedKeys
from gateway.health import Health
from gateway.idempotent import KeyedTurns
from gateway.identity.accounts import AccountStore
from gateway.identity.keyring import KeyRing
from gateway.identity.logins import Logins
from gateway.identity.providers import ProviderAccounts
from gateway.lifecycle import Lifecycle
from gateway.marketplace import Marketplace
from gateway.placement import Placement
from gateway.reach.check import ListenerChecks
from gateway.reach.tunnels import Tunnels
from gateway.request_limits import RequestLimits
from nodes.commands import CommandStore
from nodes.events import EventStore
from nodes.heartbeats import NodeStore
from nodes.load import LoadShare
from nodes.networks import AllowedNetworks
from nodes.providers import ProviderStore
from nodes.registry import Registry

SETTINGS = web.AppKey("settings", Settings)
KEYRING = web.AppKey("keyring", KeyRing)
ACCOUNTS = web.AppKey("accounts", AccountStore)
KEYED_TURNS = web.AppKey("keyed_turns", KeyedTurns)
LIFECYCLE = web.AppKey("lifecycle", Lifecycle)
REGISTRY = web.AppKey("registry", Registry)
NODES = web.AppKey("nodes", NodeStore)
PROVIDERS = web.AppKey("providers", ProviderStore)
PROVIDER_ACCOUNTS = web.AppKey("provider_accounts", ProviderAccounts)
MARKETPLACE = web.AppKey("marketplace", Marketplace)
EVENTS = web.AppKey("events", EventStore)
LOGINS = web.AppKey[Logins | None]("logins")  # None: no mail can be sent
REQUEST_LIMITS = web.AppKey("request_limits", RequestLimits)
COMMANDS = web.AppKey("commands", CommandStore)
CONTROL = web.AppKey("control", ControlHub)
NETWORKS = web.AppKey("networks", AllowedNetworks)
TUNNELS = web.AppKey("tunnels", Tunnels)
LISTENER_CHECKS = web.AppKey("listener_checks", ListenerChecks)
PLACEMENT = web.AppKey("placement", Placement)
LOAD = web.AppKey("load", LoadShare)
PRICES = web.AppKey("prices", PriceBook)
HEALTH = web.AppKey("health", Health)
CORS = web.AppKey("cors", Cors)
REFUSED_KEYS = web.AppKey("refused_keys", RefusedKeys)
METRICS = web.AppKey("metrics", Metrics)

VALKEY = web.AppKey("valkey", Redis)

REQUEST_ID = web.RequestKey("request_id", str)
