"""As much of PromQL as the dashboard uses, over two scrapes of one page; whatever else it meets is an error."""

from __future__ import annotations

import re
from math import inf, isnan, nan

import promql_parser as promql
from prometheus_client.parser import text_string_to_metric_families

__all__ = ["Page", "evaluated"]

ADDED = {"instance": "here:8765", "job": "whisper-fast"}  # by whoever scrapes
INTERVAL = "15s"
NODES = {
    promql.NumberLiteral: "number",
    promql.ParenExpr: "inside",
    promql.VectorSelector: "vector",
    promql.Call: "call",
    promql.AggregateExpr: "aggregate",
    promql.BinaryExpr: "binary",
}


class Page:
    """One scrape: each sample by its name, with its labels, and what kind of metric it is of."""

    def __init__(self, text, at):
        self.at = at
        self.samples, self.kinds = {}, {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                self.kinds[sample.name] = "counter" if family.type in ("counter", "histogram") else family.type
                self.samples.setdefault(sample.name, {})[frozenset({**sample.labels, **ADDED}.items())] = sample.value


def evaluated(query, before, now):
    """Return labels -> value of a query whose ranges reach from one page to the other."""
    for name, value in {"$__rate_interval": INTERVAL, "$instance": ".*"}.items():
        query = query.replace(name, value)
    return Evaluation(before, now).of(promql.parse(query))


class Evaluation:
    def __init__(self, before, now):
        self.before, self.now = before, now

    def of(self, node):
        return getattr(self, NODES[type(node)])(node)

    def number(self, node):
        return node.val

    def inside(self, node):
        return self.of(node.expr)

    def vector(self, node):
        assert self.now.kinds[node.name] == "gauge", f"{node.name} is a counter and stands without rate()"
        return selected(node, self.now)

    def call(self, node):
        return getattr(self, node.func.name)(*node.args)

    def rate(self, node):
        selector = node.vector_selector
        assert self.now.kinds[selector.name] == "counter", f"{selector.name} is a gauge and stands in rate()"
        earlier, seconds = selected(selector, self.before), self.now.at - self.before.at
        return {key: (value - earlier.get(key, 0.0)) / seconds for key, value in selected(selector, self.now).items()}

    def histogram_quantile(self, share, buckets):
        groups = {}
        for key, value in self.of(buckets).items():
            labels = dict(key)
            bound = float(labels.pop("le"))
            groups.setdefault(frozenset(labels.items()), []).append((bound, value))
        return {key: quantile(self.of(share), sorted(found)) for key, found in groups.items()}

    def aggregate(self, node):
        fold = {"sum": sum, "min": min, "max": max, "avg": lambda values: sum(values) / len(values)}[str(node.op)]
        by = set(node.modifier.labels) if node.modifier is not None else set()
        inside = self.of(node.expr)
        for key in inside:
            assert by <= dict(key).keys(), f"there is no label of {by} in {dict(key)}"
        groups = {}
        for key, value in inside.items():
            groups.setdefault(frozenset((k, v) for k, v in key if k in by), []).append(value)
        return {key: fold(values) for key, values in groups.items()}

    def binary(self, node):
        do = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "/": lambda a, b: a / b if b else nan}[str(node.op)]
        left, right = self.of(node.lhs), self.of(node.rhs)
        if not isinstance(left, dict):
            return {key: do(left, value) for key, value in right.items()}
        return {key: do(value, right[key]) for key, value in left.items() if key in right}


def selected(node, page):
    found = page.samples.get(node.name, {})
    for matcher in node.matchers.matchers:
        known = {name for key in found for name, _ in key}
        assert not found or matcher.name in known, f"{node.name} has no label {matcher.name}"
        found = {key: value for key, value in found.items() if matches(matcher, dict(key)[matcher.name])}
    return found


def matches(matcher, value):
    kind = str(matcher.op).rpartition(".")[2]
    if kind in ("Re", "NotRe"):
        return bool(re.fullmatch(matcher.value, value)) is (kind == "Re")
    return (matcher.value == value) is (kind == "Equal")


def quantile(share, buckets):
    """Interpolate within the bucket, as Prometheus does."""
    total, below, edge = buckets[-1][1], 0.0, 0.0
    assert buckets[-1][0] == inf
    if not total or isnan(total):
        return nan
    for bound, count in buckets:
        if count >= share * total:
            return edge if bound == inf else edge + (bound - edge) * (share * total - below) / (count - below)
        below, edge = count, bound
    return nan
