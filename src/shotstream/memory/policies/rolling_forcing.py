"""Rolling Forcing (arXiv 2509.25161): chunks at rising noise levels, denoised together behind a moving sink.

For a joint schedule (`SCHEDULES["rolling-forcing"]`). With `restart`, run each shot's windows to
their end before the next shot's begin.
"""

from dataclasses import dataclass

from shotstream.memory.plan import Call, MemoryPolicy, Place, Plan


@dataclass(frozen=True)
class RollingForcing(MemoryPolicy):
    """Denoising and committing read the memory differently; queries sit at their number in the stream.

    Denoise: the newest frames at their own positions, and the sink placed anew right before them.
    Commit: the newest frames only, the sink where it was, and so out of sight once the stream is long.
    """

    window: int = 24  # memory and the leaving chunk
    sink: int = 3
    budget: int = 21  # frames read by one call, its own included

    def plan(self, call: Call) -> Plan:
        if call.kind == "prefill" or not call.memory:
            return super().plan(call)
        if call.kind == "commit":
            whole = super().plan(call)
            return Plan(whole.queries, whole.keys[-self.budget :])
        queries = super().plan(call).queries
        sink, rest = call.memory[: self.sink], call.memory[self.sink :]
        working = rest[max(0, len(rest) - max(0, self.budget - self.sink - len(call.new))) :]
        first = call.new[0].index - len(working) - len(sink)
        placed = tuple(Place(frame, first + i) for i, frame in enumerate(sink))
        return Plan(queries, placed + tuple(Place(frame, frame.index) for frame in working) + queries)
