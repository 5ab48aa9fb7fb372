"""Metrics that are read off plain values when Prometheus asks, declared as tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

T = TypeVar("T")
Values = Mapping[tuple[str, ...], float]
"""Numbers by the values of a measure's own labels; those are ``()`` where it has none."""


@dataclass(frozen=True, slots=True)
class Measure(Generic[T]):
    """One metric, and how it is read off a source."""

    family: type[GaugeMetricFamily] | type[CounterMetricFamily]
    names: tuple[str, ...]
    """Every name that it is shown under."""
    text: str
    labels: tuple[str, ...]
    """Those that it has besides the source's."""
    read: Callable[[T], Values]


def gauge(name: str, text: str, value: Callable[[T], float], peer: str | None = None) -> Measure[T]:
    """A size; ``peer`` is the name by which vLLM's dashboards know it."""
    return Measure(GaugeMetricFamily, _names(name, peer), text, (), lambda s: {(): value(s)})


def counter(
    name: str, text: str, value: Callable[[T], float], peer: str | None = None
) -> Measure[T]:
    """A total; ``peer`` is the name by which vLLM's dashboards know it."""
    return Measure(CounterMetricFamily, _names(name, peer), text, (), lambda s: {(): value(s)})


def gauges_by(
    name: str, text: str, label: str, values: Callable[[T], Mapping[str, float]]
) -> Measure[T]:
    """A size for each value of ``label``."""
    return Measure(GaugeMetricFamily, _names(name), text, (label,), lambda s: _by_one(values(s)))


def counters_by(
    name: str, text: str, label: str, values: Callable[[T], Mapping[str, float]]
) -> Measure[T]:
    """A total for each value of ``label``."""
    return Measure(CounterMetricFamily, _names(name), text, (label,), lambda s: _by_one(values(s)))


class TableCollector(Collector, Generic[T]):
    """Shows a table of measures of the sources it was given last."""

    def __init__(self, labels: Sequence[str], table: Sequence[Measure[T]]) -> None:
        self.sources: Sequence[tuple[Sequence[str], T]] = ()
        """Each with its values of ``labels``."""
        self._labels = tuple(labels)
        self._table = table

    def collect(self) -> Iterator[Metric]:
        """Yield every metric of the table, also where there is no source."""
        for measure in self._table:
            for name in measure.names:
                family = measure.family(name, measure.text, labels=self._labels + measure.labels)
                for labels, source in self.sources:
                    for own, value in measure.read(source).items():
                        family.add_metric((*labels, *own), value)
                yield family


def _names(name: str, peer: str | None = None) -> tuple[str, ...]:
    ours = f"inference_pio_{name}"
    return (ours,) if peer is None else (ours, f"vllm:{peer}")


def _by_one(values: Mapping[str, float]) -> Values:
    return {(key,): value for key, value in values.items()}
