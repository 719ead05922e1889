"""Counts and times of the server, for Prometheus."""

from resnet_bk.extras import extra

with extra("serve"):
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Counters of one server.

    Attributes:
        registry: of all of them.
    """

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("resnet_bk_requests", "Requests answered.", ["path", "status"], registry=registry)
        self.prompt_tokens = Counter("resnet_bk_prompt_tokens", "Tokens of prompts read.", registry=registry)
        self.tokens = Counter("resnet_bk_generated_tokens", "Tokens generated.", registry=registry)
        self.texts = Counter("resnet_bk_texts", "Texts accepted.", registry=registry)
        self.failed = Counter("resnet_bk_failed_texts", "Texts that ended with an error.", registry=registry)
        self.cancelled = Counter("resnet_bk_cancelled_texts", "Texts whose clients have left.", registry=registry)
        self.waiting = Gauge("resnet_bk_waiting_texts", "Texts that wait for a place.", registry=registry)
        self.running = Gauge("resnet_bk_running_texts", "Texts that are decoded.", registry=registry)
        self.first_token = self._seconds("first_token", "From the arrival of a text to its first token.")
        self.text = self._seconds("text", "From the arrival of a text to its end.")
        self.step = self._seconds("step", "One step of all texts that are decoded.")

    def _seconds(self, name: str, help_text: str) -> Histogram:
        return Histogram(f"resnet_bk_{name}_seconds", help_text, buckets=_SECONDS, registry=self.registry)
