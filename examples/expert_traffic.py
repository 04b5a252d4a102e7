"""Which experts a model uses, what a cache of some of them would be worth, and a picture of it."""

import sys
import tempfile
from pathlib import Path

from ernie45 import ErnieModel, RoutingTrace
from ernie45.testing import task_names, tasks

NAME = "ernie45/tiny-moe"

with ErnieModel.from_pretrained(NAME) as model, model.trace_routing() as recording:
    for task in task_names(NAME):
        for item in tasks(task, 5, seed=0, split="test"):
            model.chat(item.messages, temperature=0)

trace = recording.trace
print(trace)
for layer, counts in zip(trace.layers, trace.counts().tolist(), strict=True):
    print(f"layer {layer}: {counts}")

num_experts = len(trace.layers) * trace.num_experts
for slots in (4, 8, 12, 18, num_experts):
    print(f"with {slots} of {num_experts} experts in memory, {trace.replay(slots):.0%} were found there")

with tempfile.TemporaryDirectory() as temporary:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else temporary)
    trace.save(folder / "traffic.npz")
    same = RoutingTrace.load(folder / "traffic.npz").heat_map() == trace.heat_map()
    (folder / "traffic.svg").write_text(trace.heat_map(), encoding="utf-8")
    print(f"saved; the same picture when loaded again: {same}")
