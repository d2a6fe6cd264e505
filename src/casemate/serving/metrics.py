"""What the server counts, for Prometheus. An attack in progress shows in the manifold scores and the refusals."""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
SHARES = tuple(step / 20 for step in range(1, 21))


class Metrics:
    """One registry of its own, so that several servers can live in one process."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        self.requests = Counter(
            "casemate_requests", "Requests by route and status.", ["route", "status"], registry=registry
        )
        self.seconds = Histogram(
            "casemate_request_seconds", "From a request's headers to the end of its answer.", ["route"],
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self.rejected = Counter("casemate_rejected", "Requests refused, by reason.", ["reason"], registry=registry)
        self.batch = Histogram(
            "casemate_batch_images", "Images of each run of the model.", registry=registry,
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
        )  # fmt: skip
        self.waiting = Gauge("casemate_queue_images", "Images waiting for the model.", registry=registry)
        self.model_seconds = Histogram(
            "casemate_model_seconds", "Of each run of the model.", buckets=SECONDS, registry=registry
        )
        self.manifold = Histogram(
            "casemate_manifold_score", "How clean each image looks to the critic; low: perturbed.", buckets=SHARES,
            registry=registry,
        )  # fmt: skip
        self.flagged = Counter("casemate_flagged", "Images that the model's detector flags.", registry=registry)
        self.confidence = Histogram(
            "casemate_confidence", "The probability of each image's class.", buckets=SHARES, registry=registry
        )
        self.predictions = Counter("casemate_predictions", "Images by class.", ["label"], registry=registry)
        self.model = Gauge(
            "casemate_model_info", "Always 1; what is served is in the labels.",
            ["name", "version", "sha256", "provider", "threat"], registry=registry,
        )  # fmt: skip

    def text(self) -> bytes:
        """In Prometheus's text format."""
        return bytes(generate_latest(self.registry))
