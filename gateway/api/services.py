"""What handlers need, under typed keys: put into the application by `gateway.app`, read by `gateway.api`."""

from aiohttp import web

from billing.prices import PriceBook
from config.defaults import Settings
from config.metrics import Metrics
from gateway.edge.cors import Cors
from gateway.edge.refused import RefusedKeys
from gateway.health import Health
from gateway.idempotent import KeyedTurns
from gateway.identity.accounts import AccountStore
from gateway.identity.keyring import KeyRing
from gateway.lifecycle import Lifecycle
from gateway.placement import Placement
from nodes.heartbeats import AllowedNetworks, NodeStore
from nodes.load import LoadShare
from nodes.registry import Registry
from nodes.wishes import WishStore

SETTINGS = web.AppKey("settings", Settings)
KEYRING = web.AppKey("keyring", KeyRing)
ACCOUNTS = web.AppKey("accounts", AccountStore)
KEYED_TURNS = web.AppKey("keyed_turns", KeyedTurns)
LIFECYCLE = web.AppKey("lifecycle", Lifecycle)
REGISTRY = web.AppKey("registry", Registry)
NODES = web.AppKey("nodes", NodeStore)
NETWORKS = web.AppKey("networks", AllowedNetworks)
PLACEMENT = web.AppKey("placement", Placement)
WISHES = web.AppKey("wishes", WishStore)
LOAD = web.AppKey("load", LoadShare)
PRICES = web.AppKey("prices", PriceBook)
HEALTH = web.AppKey("health", Health)
CORS = web.AppKey("cors", Cors)
REFUSED_KEYS = web.AppKey("refused_keys", RefusedKeys)
METRICS = web.AppKey("metrics", Metrics)

REQUEST_ID = web.RequestKey("request_id", str)
