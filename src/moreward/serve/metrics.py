"""What Prometheus reads at /metrics. No text of a request is ever a label."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from moreward.serve.queue import Batched, Queue

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 120)
TOKENS = (64, 256, 1024, 4096, 16384, 65536)


class Metrics:
    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter("moreward_requests", "Requests.", ["route", "code"], registry=registry)
        self.latency = Histogram(
            "moreward_latency_seconds",
            "Of requests, in the queue, in the model.",
            ["stage"],
            buckets=SECONDS,
            registry=registry,
        )
        self.batch_tokens = Histogram("moreward_batch_tokens", "Estimated.", buckets=TOKENS, registry=registry)
        self.experts = Counter("moreward_expert_requests", "Rewards by expert.", ["expert"], registry=registry)
        self.entropy = Gauge("moreward_router_entropy", "Of the last reward: 0 sure, 1 no idea.", registry=registry)
        self.non_finite = Counter("moreward_nonfinite", "Rewards that were NaN or infinite.", registry=registry)
        self.truncated = Counter("moreward_truncated", "Texts that were cut, as asked.", registry=registry)
        self.rejected = Counter("moreward_rejected", "Requests refused.", ["reason"], registry=registry)
        self.version = Gauge("moreward_model_version_info", "Always 1.", ["version"], registry=registry)

        self.reloads = Counter("moreward_reloads", "Models loaded in place of another.", ["outcome"], registry=registry)

    def loaded(self, about: Mapping[str, Any]) -> None:
        self.version.clear()
        self.version.labels(about["version"]).set(1)

    def watch(self, queue: Queue, is_ready: Callable[[], bool]) -> None:
        gauges: Mapping[str, Callable[[], float]] = {
            "moreward_queue_tokens": lambda: queue.num_tokens,
            "moreward_queue_items": lambda: queue.num_items,
            "moreward_ready": lambda: float(is_ready()),
        }
        for name, value in gauges.items():
            Gauge(name, "Now.", registry=self.registry).set_function(value)

    def batched(self, batch: Batched) -> None:
        self.batch_tokens.observe(batch.num_tokens)
        self.latency.labels("queue").observe(batch.waited)
        self.latency.labels("model").observe(batch.took)

    def rewarded(self, result: Mapping[str, Any]) -> None:
        if error := result.get("error"):
            if error["code"] == "non_finite":
                self.non_finite.inc()
            return
        if result["expert"]:
            self.experts.labels(result["expert"]).inc()
        if result["router_entropy"] is not None:
            self.entropy.set(result["router_entropy"])
        if result["truncated"]:
            self.truncated.inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)
