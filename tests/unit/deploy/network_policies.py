"""Who reaches whom, by the rules of `networking.k8s.io/v1` NetworkPolicies."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from manifests import NAMESPACE, Object, selects


@dataclass(frozen=True)
class End:
    """One end of a connection: a pod, or where `address` is set, one outside of the cluster."""

    labels: Mapping[str, str] = field(default_factory=dict)
    namespace: str = NAMESPACE
    namespace_labels: Mapping[str, str] = field(default_factory=dict)
    address: str = ""


def reaches(
    policies: Sequence[Object], source: End, target: End, port: int, protocol: str = "TCP"
) -> bool:
    """Whether both what isolates the source and what isolates the target let it pass."""
    return _passes(policies, "Egress", source, target, port, protocol) and _passes(
        policies, "Ingress", target, source, port, protocol
    )


def _passes(
    policies: Sequence[Object], direction: str, here: End, there: End, port: int, protocol: str
) -> bool:
    asked = [p["spec"] for p in policies if _isolates(p["spec"], direction, here)]
    rules = [rule for spec in asked for rule in spec.get(direction.lower()) or ()]
    return not asked or any(_allows(rule, there, port, protocol) for rule in rules)


def _isolates(spec: Object, direction: str, end: End) -> bool:
    inside = not end.address and end.namespace == NAMESPACE
    return inside and direction in spec["policyTypes"] and selects(spec["podSelector"], end.labels)


def _allows(rule: Object, there: End, port: int, protocol: str) -> bool:
    peers = rule.get("from") or rule.get("to")
    ports = rule.get("ports")
    return (not peers or any(_is(peer, there) for peer in peers)) and (
        not ports or any((p["port"], p["protocol"]) == (port, protocol) for p in ports)
    )


def _is(peer: dict[str, Any], end: End) -> bool:
    if "ipBlock" in peer:
        return bool(end.address) and _in_block(peer["ipBlock"], end.address)
    if end.address:
        return False
    named = {"kubernetes.io/metadata.name": end.namespace, **end.namespace_labels}
    there = (
        selects(peer["namespaceSelector"], named)
        if "namespaceSelector" in peer
        else end.namespace == NAMESPACE
    )
    return there and selects(peer.get("podSelector", {}), end.labels)


def _in_block(block: dict[str, Any], address: str) -> bool:
    found = ipaddress.ip_address(address)
    return found in ipaddress.ip_network(block["cidr"]) and not any(
        found in ipaddress.ip_network(other) for other in block.get("except", ())
    )
