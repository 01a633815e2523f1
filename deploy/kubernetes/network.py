"""Services, and the NetworkPolicies that leave only the edges that pdserve needs.

clients ──▶ router:public      workers ──▶ router:internal     router ──▶ decode:grpc
decode ──▶ prefill:grpc, kv    workers ──▶ DNS                 prometheus ──▶ *:metrics
"""

from collections.abc import Sequence

from deploy.kubernetes.pools import Pool
from deploy.kubernetes.values import (
    CLIENT_LABEL,
    INTERNAL_PORT,
    KV_PORT,
    METRICS_PORT,
    ROUTER_PORT,
    WORKER_PORT,
    Manifest,
    RenderOptions,
    cluster_labels,
    labels,
    metadata,
)
from pdserve.domain.messages import Role

DNS_PEER: Manifest = {
    "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}},
    "podSelector": {"matchLabels": {"k8s-app": "kube-dns"}},
}


def services(options: RenderOptions, pools: Sequence[Pool]) -> list[Manifest]:
    """The public one for clients, and headless ones: routers for workers, a name a worker pod."""
    router = labels(options, "router")
    public = _service(options.name, router, {"public": ROUTER_PORT})
    # Also routers that drain: their workers stay with them until the last answer.
    internal = _service(options.internal_service, router, {"internal": INTERNAL_PORT})
    internal["spec"] |= {"clusterIP": "None", "publishNotReadyAddresses": True}
    found = [public, internal]
    for pool in pools:
        if pool.is_multi_node:
            continue  # a LeaderWorkerSet brings its own
        of_pool = labels(options, pool.role, pool.name)
        service = _service(f"{options.name}-{pool.name}", of_pool, {"grpc": WORKER_PORT})
        service["spec"] |= {"clusterIP": "None", "publishNotReadyAddresses": True}
        found.append(service)
    return found


def network_policies(options: RenderOptions, pools: Sequence[Pool]) -> list[Manifest]:
    """Default-deny for the namespace, then one policy a component with its edges."""
    prefill, decode = ({"podSelector": {"matchLabels": labels(options, role)}} for role in Role)
    clients = {"namespaceSelector": {}, "podSelector": {"matchLabels": CLIENT_LABEL}}
    roles = {pool.role for pool in pools}
    workers = [peer for role, peer in zip(Role, (prefill, decode), strict=True) if role in roles]
    found = [
        _policy(f"{options.name}-default-deny", {}, ingress=[], egress=[]),
        _policy(
            options.router_name,
            labels(options, "router"),
            ingress=[_from([clients], ROUTER_PORT), _from(workers, INTERNAL_PORT)],
            egress=[_to([decode], WORKER_PORT)],
        ),
    ]
    kv_ports = sorted({port for pool in pools for port in kv_ports_of(pool).values()})
    for role in sorted(roles):
        found.append(_worker_policy(options, role, kv_ports))
    found += [_ranks_policy(options, pool) for pool in pools if pool.is_multi_node]
    return found


def kv_ports_of(pool: Pool) -> dict[str, int]:
    """One for each rank of a pod, by name. Decode workers read, nobody reads them."""
    if pool.role is not Role.PREFILL:
        return {}
    num_ranks = pool.ranks_per_pod if pool.settings.engine.engine == "torch" else 1
    return {"kv" if index == 0 else f"kv-{index}": KV_PORT + index for index in range(num_ranks)}


def _worker_policy(options: RenderOptions, role: Role, kv_ports: Sequence[int]) -> Manifest:
    router, prefill, decode = (
        {"podSelector": {"matchLabels": labels(options, each)}}
        for each in ("router", "prefill", "decode")
    )
    egress = [_to([router], INTERNAL_PORT), dns_egress()]
    if role is Role.PREFILL:
        ingress = [_from([decode], WORKER_PORT, *kv_ports)]
    else:
        ingress = [_from([router], WORKER_PORT)]
        if kv_ports:
            egress.insert(1, _to([prefill], WORKER_PORT, *kv_ports))
    return _policy(f"{options.name}-{role}", labels(options, role), ingress=ingress, egress=egress)


def _ranks_policy(options: RenderOptions, pool: Pool) -> Manifest:
    """Ranks of one worker talk to one another on ports that the collectives library picks."""
    of_pool = labels(options, pool.role, pool.name)
    peer = [{"podSelector": {"matchLabels": of_pool}}]
    return _policy(
        f"{options.name}-{pool.name}-ranks",
        of_pool,
        ingress=[{"from": peer}],
        egress=[{"to": peer}],
    )


def metrics_policy(options: RenderOptions) -> Manifest:
    """Prometheus reads every pod's metrics, from its own namespace."""
    prometheus = {
        "namespaceSelector": {
            "matchLabels": {"kubernetes.io/metadata.name": options.prometheus_namespace}
        },
        "podSelector": {"matchLabels": {"app.kubernetes.io/name": "prometheus"}},
    }
    name = f"{options.name}-metrics"
    policy = _policy(name, cluster_labels(options), ingress=[_from([prometheus], METRICS_PORT)])
    policy["spec"]["policyTypes"] = ["Ingress"]
    return policy


def client_policy(options: RenderOptions, name: str) -> Manifest:
    """A client in pdserve's own namespace, such as the smoke test, is under default-deny too."""
    router = {"podSelector": {"matchLabels": labels(options, "router")}}
    policy = _policy(name, CLIENT_LABEL, egress=[_to([router], ROUTER_PORT), dns_egress()])
    policy["spec"]["policyTypes"] = ["Egress"]
    return policy


def dns_egress() -> Manifest:
    ports = [{"protocol": protocol, "port": 53} for protocol in ("UDP", "TCP")]
    return {"to": [DNS_PEER], "ports": ports}


def _service(name: str, own: dict[str, str], ports: dict[str, int]) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(name, own),
        "spec": {
            "type": "ClusterIP",
            "selector": own,
            "ports": [
                {
                    "name": port_name,
                    "port": port,
                    "targetPort": port_name,
                    "protocol": "TCP",
                    "appProtocol": "kubernetes.io/h2c",
                }
                for port_name, port in ports.items()
            ],
        },
    }


def _policy(
    name: str,
    selector: dict[str, str],
    *,
    ingress: Sequence[Manifest] = (),
    egress: Sequence[Manifest] = (),
) -> Manifest:
    spec: Manifest = {
        "podSelector": {"matchLabels": selector} if selector else {},
        "policyTypes": ["Ingress", "Egress"],
    }
    if ingress:
        spec["ingress"] = list(ingress)
    if egress:
        spec["egress"] = list(egress)
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata(name, {"app.kubernetes.io/name": "pdserve"}),
        "spec": spec,
    }


def _from(peers: Sequence[Manifest], *ports: int) -> Manifest:
    return {"from": list(peers), "ports": _ports(ports)}


def _to(peers: Sequence[Manifest], *ports: int) -> Manifest:
    return {"to": list(peers), "ports": _ports(ports)}


def _ports(ports: Sequence[int]) -> list[Manifest]:
    return [{"protocol": "TCP", "port": port} for port in ports]
