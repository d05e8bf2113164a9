"""The router's part in the shared index: a copy to route by, and a watch on how right it is."""

from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.core import CounterMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from headrace.clock import Clock
from headrace.index.copy import open_copy
from headrace.index.service import Hits, IndexServicer
from headrace.router.config import RouterConfig
from headrace.router.drift import HitDrift
from headrace.router.prefixes import Prefixes


class SharedIndex:
    """A copy of the index, or its absence: without Redis requests are routed by load alone.

    Args:
        config: Where the log is, how large the copy may become, which drift is an alarm.
        clock: Measures ages.

    Attributes:
        prefixes: Asked at every choice; None without a copy.
        drift: Told at every answer.

    Raises:
        ConfigError: the settings of the connection are wrong.
    """

    def __init__(self, config: RouterConfig, clock: Clock) -> None:
        self._name = config.name
        self._copy = open_copy(config.redis, config.index, clock)
        self.prefixes = None if self._copy is None else Prefixes(self._copy.index, self._is_current)
        self.drift = HitDrift(alarm_at=config.drift_alarm)

    def servicer(self) -> IndexServicer:
        """Return what describes the copy to others."""
        return IndexServicer(self._name, self._copy, self._hits)

    def publish(self, registry: CollectorRegistry) -> None:
        """Show the state of the copy as metrics."""
        if self._copy is None:
            return
        index, replica = self._copy.index, self._copy.replica
        readings = {
            "blocks": ("Different blocks in the copy of the index.", lambda: index.num_blocks),
            "bytes": ("Memory that the copy of the index takes.", lambda: index.memory_bytes),
            "connected": ("1 when the log of the index can be read.", lambda: replica.state().is_connected),
            "synced": ("1 when the copy has caught up since its start.", lambda: replica.state().is_synced),
            "drift_ratio": ("Share by which promised and found hit tokens differ lately.", lambda: self.drift.share),
            "drift_alarm": ("1 when that share says that the index is wrong.", lambda: self.drift.is_alarming),
        }
        for name, (text, read) in readings.items():
            Gauge(f"headrace_router_index_{name}", text, registry=registry).set_function(read)
        registry.register(_HitTokens(self.drift))

    async def run(self) -> None:
        """Follow the log until cancelled."""
        if self._copy is not None:
            await self._copy.replica.run()

    async def close(self) -> None:
        """Give the connection up."""
        if self._copy is not None:
            await self._copy.close()

    def _is_current(self) -> bool:
        if self._copy is None:
            return False
        state = self._copy.replica.state()
        return state.is_connected and state.is_synced

    def _hits(self) -> Hits:
        drift = self.drift
        return Hits(
            predicted_tokens=drift.predicted_tokens,
            actual_tokens=drift.actual_tokens,
            drift=drift.share,
            drift_alarm=drift.alarm_at,
        )


class _HitTokens(Collector):
    """Shows the tokens that the index promised and those that were found."""

    def __init__(self, drift: HitDrift) -> None:
        self._drift = drift

    def collect(self) -> list[Metric]:
        """Return both counters."""
        readings = {
            "predicted": ("Prompt tokens that the index promised as cached.", self._drift.predicted_tokens),
            "actual": ("Prompt tokens that were found cached.", self._drift.actual_tokens),
        }
        return [
            CounterMetricFamily(f"headrace_router_{name}_hit_tokens", text, value=value)
            for name, (text, value) in readings.items()
        ]
