"""What Kubernetes NetworkPolicies allow, worked out as the API documents it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Object = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A pod as policies see it."""

    name: str
    ip: str
    namespace: str
    labels: Mapping[str, str]
    ports: Mapping[str, int] = field(default_factory=dict)  # named container ports

    @property
    def namespace_labels(self) -> Mapping[str, str]:
        """Kubernetes sets this one itself."""
        return {"kubernetes.io/metadata.name": self.namespace}


def allows(
    policies: Sequence[Object], source: Endpoint, target: Endpoint, protocol: str, port: int
) -> bool:
    """Whether `source` may open a connection: its egress and the target's ingress must agree."""
    leaves = _passes(policies, "Egress", source, target, target, protocol, port)
    return leaves and _passes(policies, "Ingress", target, source, target, protocol, port)


def _passes(
    policies: Sequence[Object],
    direction: str,
    owner: Endpoint,
    peer: Endpoint,
    server: Endpoint,
    protocol: str,
    port: int,
) -> bool:
    """A pod that no policy of this direction selects is open; else one rule must match."""
    chosen = [
        policy
        for policy in policies
        if policy["metadata"]["namespace"] == owner.namespace
        and direction in policy["spec"]["policyTypes"]
        and _selects(policy["spec"]["podSelector"], owner.labels)
    ]
    rules = [rule for policy in chosen for rule in policy["spec"].get(direction.lower(), [])]
    side = "from" if direction == "Ingress" else "to"
    return not chosen or any(
        _has_peer(rule.get(side), peer, owner.namespace)
        and _has_port(rule.get("ports"), server, protocol, port)
        for rule in rules
    )


def _has_peer(peers: Sequence[Object] | None, peer: Endpoint, own_namespace: str) -> bool:
    return not peers or any(_is_peer(each, peer, own_namespace) for each in peers)


def _is_peer(rule: Object, peer: Endpoint, own_namespace: str) -> bool:
    assert set(rule) <= {"podSelector", "namespaceSelector"}, rule
    if "namespaceSelector" in rule:
        is_there = _selects(rule["namespaceSelector"], peer.namespace_labels)
    else:
        is_there = peer.namespace == own_namespace
    return is_there and _selects(rule.get("podSelector", {}), peer.labels)


def _has_port(ports: Sequence[Object] | None, server: Endpoint, protocol: str, port: int) -> bool:
    return not ports or any(
        each.get("protocol", "TCP") == protocol
        and server.ports.get(str(each["port"]), each["port"]) == port
        for each in ports
    )


def _selects(selector: Object, labels: Mapping[str, str]) -> bool:
    assert set(selector) <= {"matchLabels"}, selector
    wanted = selector.get("matchLabels", {})
    return all(labels.get(name) == value for name, value in wanted.items())
