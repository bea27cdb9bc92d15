"""Energy of a sustained run of one step, in joules, from a counter of the hardware.

Such counters move about every 100 ms: joules of one step of a millisecond are only known as an average over thousands.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from lora_bench.bench.meter import meter_of
from lora_bench.bench.nvml import GpuLost, Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable

    from lora_bench.bench.meter import Meter

LEAST_TICKS, LEAST_SECONDS = 100, 10.0
"""What a window must hold to be valid: movements of the counter, and seconds."""
LONGEST = 3.0
"""How much longer than asked for a window may get where the counter is slow."""
AGREEMENT = 0.05
"""How far integrated power may lie from the counter's joules."""


@dataclass(frozen=True)
class Energy:
    """Joules of `steps` steps that ran for `window_seconds`, one after the other.

    `joules`, `joules_per_step` and `joules_per_token` are all that the `attribution` drew; `joules_net` is without what
    it drew when idle. `validity` is "verified" (integrated power agrees), "unverified: ..." or "invalid: ...".
    """

    joules: float
    joules_net: float | Unavailable
    joules_per_step: float
    joules_per_token: float | Unavailable
    window_seconds: float
    steps: int
    ticks: int
    mean_watts: float
    idle_watts: float | Unavailable
    source: str
    attribution: str
    validity: str

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {name: str(value) if isinstance(value, Unavailable) else value for name, value in asdict(self).items()}


@dataclass
class Trace:
    """What a meter showed over time: when its counter moved, and power at each look."""

    meter: Meter
    seconds: list[float] = field(default_factory=list)
    joules: list[float] = field(default_factory=list)
    """The counter after each of its movements; the first of both lists is where it stood."""
    power: list[tuple[float, float]] = field(default_factory=list)
    trouble: str = ""
    """Why the counter cannot be believed or read any more."""
    no_power: str = ""
    """Why there is no power to check it against."""

    def look(self) -> None:
        """Read the meter once."""
        try:
            now, counted, watts = self.meter.now(), self.meter.joules(), self.meter.watts()
        except GpuLost as lost:  # from a thread: whoever runs the steps is to stop at once
            self.trouble = str(lost)
            raise
        if isinstance(watts, Unavailable):
            self.no_power = watts.reason
        else:
            self.power.append((now, watts))
        if isinstance(counted, Unavailable):
            self.trouble = self.trouble or counted.reason
        elif self.joules and counted < self.joules[-1]:
            self.trouble = self.trouble or f"the counter went back from {self.joules[-1]:g} to {counted:g} J"
        elif not self.joules or counted != self.joules[-1]:
            self.seconds.append(now)
            self.joules.append(counted)

    @property
    def ticks(self) -> int:
        """Movements after the first: the first one only shows when the counter's step began."""
        return max(0, len(self.seconds) - 2)

    @property
    def span(self) -> float:
        """Seconds from the counter's first movement to its last."""
        return self.seconds[-1] - self.seconds[1] if self.ticks else 0.0

    def watts(self) -> float | Unavailable:
        """Mean power by the counter, from its first movement to its last."""
        if self.trouble:
            return Unavailable(self.trouble)
        if not self.ticks:
            return Unavailable("the energy counter did not move twice")
        return (self.joules[-1] - self.joules[1]) / self.span

    def integrated(self) -> float | Unavailable:
        """Mean power by trapezoids over the looks in the same span."""
        inside = [(time, watts) for time, watts in self.power if self.seconds[1] <= time <= self.seconds[-1]]
        if len(inside) < LEAST_TICKS:
            return Unavailable(self.no_power or f"power was read only {len(inside)} times")
        area = sum((b - a) * (v + w) / 2 for (a, v), (b, w) in pairwise(inside))
        return area / (inside[-1][0] - inside[0][0])


def measure_energy(
    step: Callable[[], object],
    *,
    device: str,
    tokens: int,
    seconds: float = LEAST_SECONDS,
    idle_seconds: float = 2.0,
    meter: Meter | Unavailable | None = None,
) -> Energy | Unavailable:
    """Joules of `step`, run again and again for `seconds` or longer, after `idle_seconds` without it.

    The run goes on until the counter has moved 100 times over `seconds`, up to three times as long; what is then still
    missing is said in `validity`. Each step ends on an idle device, as when it is timed. `tokens`: how many one step
    reads. Call it in a pass of its own, not while something is timed: the meter is read every 20 ms meanwhile.
    """
    meter = meter_of(device) if meter is None else meter
    if isinstance(meter, Unavailable):
        return meter
    finish = _finisher(device)
    step()
    finish()
    idle = Trace(meter)
    with meter.every(idle.look):
        meter.sleep(idle_seconds)
    trace, steps, began = Trace(meter), 0, meter.now()
    with meter.every(trace.look):
        while not _enough(trace, meter.now() - began, seconds):
            step()
            finish()
            steps += 1
        elapsed = meter.now() - began
    watts = trace.watts()
    if isinstance(watts, Unavailable):
        return watts
    joules, idle_watts = watts * elapsed, idle.watts()
    return Energy(
        joules=joules,
        joules_net=_net(joules, idle_watts, elapsed),
        joules_per_step=joules / steps,
        joules_per_token=joules / steps / tokens if tokens else Unavailable("no token is read"),
        window_seconds=elapsed,
        steps=steps,
        ticks=trace.ticks,
        mean_watts=watts,
        idle_watts=idle_watts,
        source=meter.source,
        attribution=meter.attribution,
        validity=_validity(trace, watts),
    )


def _enough(trace: Trace, elapsed: float, seconds: float) -> bool:
    if trace.trouble or elapsed >= LONGEST * seconds or (elapsed >= seconds and not trace.ticks):
        return True
    return trace.span >= seconds and trace.ticks >= LEAST_TICKS


def _net(joules: float, idle_watts: float | Unavailable, seconds: float) -> float | Unavailable:
    if isinstance(idle_watts, Unavailable):
        return Unavailable(f"idle power is not known: {idle_watts.reason}")
    net = joules - idle_watts * seconds
    return net if net > 0 else Unavailable(f"idle, it drew no less: {idle_watts:.1f} W")


def _validity(trace: Trace, watts: float) -> str:
    short = []
    if trace.ticks < LEAST_TICKS:
        short.append(f"the counter moved {trace.ticks} times, at least {LEAST_TICKS} are wanted")
    if trace.span < LEAST_SECONDS:
        short.append(f"a window of {trace.span:.1f} s, at least {LEAST_SECONDS:g} are wanted")
    if short:
        return f"invalid: {'; '.join(short)}"
    integrated = trace.integrated()
    if isinstance(integrated, Unavailable):
        return f"unverified: {integrated.reason}"
    difference = integrated / watts - 1
    return "verified" if abs(difference) <= AGREEMENT else f"unverified: integrated power is {difference:+.1%} off"


def _finisher(device: str) -> Callable[[], object]:
    if not device.startswith("cuda"):
        return lambda: None
    import torch

    return lambda: torch.cuda.synchronize(device)
