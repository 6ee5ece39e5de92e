"""Counts in Prometheus' format, under vLLM's names where they mean the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lora_kit.serving.adapter_slots import AdapterSlots
from lora_kit.serving.model_worker import ModelWorker


class _Measured(Protocol):
    """What is measured of a server."""

    base_name: str
    worker: ModelWorker


class ServerMetrics(Collector):
    """Reads the counts of a worker whenever they are asked for.

    Args:
        served: the server.
    """

    def __init__(self, served: _Measured) -> None:
        self._served = served
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def render(self) -> bytes:
        """Return the counts as Prometheus reads them."""
        return generate_latest(self._registry)

    def describe(self) -> list[Metric]:
        return []  # so that nothing is collected when this is registered

    def collect(self) -> Iterator[Metric]:
        """Yield every count."""
        worker, model = self._served.worker, [self._served.base_name]
        counts = worker.counts
        for name, text, value in (
            ("vllm:num_requests_running", "Requests that have begun.", worker.running),
            ("vllm:num_requests_waiting", "Requests that wait.", worker.waiting),
            ("lora_kit:step_seconds", "How long the present step takes so far.", worker.stuck_seconds),
        ):
            gauge = GaugeMetricFamily(name, text, labels=["model_name"])
            gauge.add_metric(model, value)
            yield gauge
        for name, text, value in (
            ("vllm:prompt_tokens", "Tokens of prompts of finished requests.", counts.prompt_tokens),
            ("vllm:generation_tokens", "Tokens of answers.", counts.new_tokens),
            ("vllm:prefix_cache_hits", "Tokens of prompts that were not computed again.", counts.reused_tokens),
            ("lora_kit:requests", "Requests taken.", counts.requests),
            ("lora_kit:steps", "Steps of the engine.", counts.steps),
        ):
            counter = CounterMetricFamily(name, text, labels=["model_name"])
            counter.add_metric(model, value)
            yield counter
        yield self._count_finished()
        yield self._list_slots(worker.slots)

    def _count_finished(self) -> Metric:
        text = "Requests that ended, by reason."
        finished = CounterMetricFamily("vllm:request_success", text, labels=["model_name", "finished_reason"])
        for reason, value in self._served.worker.counts.finished.items():
            finished.add_metric([self._served.base_name, reason], value)
        return finished

    def _list_slots(self, slots: AdapterSlots) -> Metric:
        text = "Adapters in slots; the value is how many requests use one now."
        gauge = GaugeMetricFamily("lora_adapter_loaded", text, labels=["digest", "pinned"])
        for digest, use in slots.describe().items():
            gauge.add_metric([digest[:12], str(use.pinned).lower()], use.leases)
        return gauge
