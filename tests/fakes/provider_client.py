"""A provider as its owner and its agents speak to a gateway: over HTTP, each call with its status and body."""

import uuid
from typing import Any

from tests.gateways import MODEL, TestGateway

REGISTRATION = {"name": "Ahmed", "email": "ahmed@example.sa", "gpu_model": "NVIDIA RTX 3090", "os": "linux"}
GPU = {
    "gpu_name": "NVIDIA RTX 4090", "gpu_vram_mib": 24564, "driver_version": "550.54", "gpu_util_pct": 41,
    "temp_c": 68, "power_w": 310.5, "free_vram_mib": 12452, "daemon_version": "0.1.0", "compute_capability": "8.9",
    "cuda_version": "12.4", "gpu_count": 1,
}  # fmt: skip

Answer = tuple[int, Any]


async def call(gw: TestGateway, method: str, path: str, body: Any = None, **headers: str) -> Answer:
    """One request; header names are written with underscores."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with gw.http.request(method, gw.url + path, json=body, headers=named) as reply:
        assert reply.content_type == "application/json"
        return reply.status, await reply.json()


class ProviderClient:
    """One provider, and one node of it."""

    def __init__(self, gw: TestGateway, provider_id: int, key: str) -> None:
        self.gw, self.id, self.key = gw, provider_id, key
        self.node_id = str(uuid.uuid4())

    async def get(self, path: str) -> Answer:
        return await call(self.gw, "GET", f"/api/providers/{path}", x_provider_key=self.key)

    async def post(self, path: str, **body: Any) -> Answer:
        return await call(self.gw, "POST", f"/api/providers/{path}", body, x_provider_key=self.key)

    async def beat(self, *urls: str, **more: Any) -> Answer:
        models = [{"id": MODEL, "context_length": 2048, "kind": "generate", "parent": None}]
        engines = [
            {"engine_id": f"e{number}", "url": url, "state": "ready", "models": models}
            for number, url in enumerate(urls)
        ]
        body = {"api_key": self.key, "node_id": self.node_id, "engines": engines} | more
        return await call(self.gw, "POST", "/api/providers/heartbeat", body)

    async def me(self) -> dict[str, Any]:
        status, body = await self.get("me")
        assert status == 200, body
        return dict(body["provider"])

    @property
    def engine_key(self) -> str:
        return f"{self.node_id}/e0"

    def is_routed(self) -> bool:
        return self.gw.gateway.registry.engine(self.engine_key) is not None


async def registered(gw: TestGateway, **changes: Any) -> ProviderClient:
    status, body = await call(gw, "POST", "/api/providers/register", REGISTRATION | changes)
    assert status == 200, body
    return ProviderClient(gw, body["provider_id"], body["api_key"])
