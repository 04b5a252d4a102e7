"""What models take in memory, and what would make them fit: known without a network, and kept to when one is loaded."""

from ernie45 import ErnieModel, MemoryPlan, OutOfMemoryError, plan_memory


def on_24_gib(name: str) -> MemoryPlan:
    """One request of 8,192 tokens on a CPU, at the best quality that fits."""
    return plan_memory(name, memory="24GiB", device="cpu", dtype="bfloat16", context_tokens=8192, max_batch=1)


for name in ("ERNIE-4.5-0.3B-PT", "ERNIE-4.5-21B-A3B-PT", "ERNIE-4.5-VL-28B-A3B-PT", "ERNIE-4.5-300B-A47B-PT"):
    plan = on_24_gib(name)
    print(f"{name:23} {plan.preset}, {plan.weight_bytes / 2**30:.1f} GiB of weights: {plan.verdict}")

print(f"\n{on_24_gib('ERNIE-4.5-300B-A47B-PT')}\n")

beside_a_gpu = {"cuda:0": "8GiB", "cpu": "24GiB"}
for device in plan_memory("ERNIE-4.5-21B-A3B-PT", quantization="int4", memory=beside_a_gpu).devices:
    print(f"{device.device} has attention of {len(device.layers)} layers and experts of {len(device.expert_layers)}")

with ErnieModel.from_pretrained("ernie45/tiny-moe", memory="2GiB", device="cpu") as model:
    loaded = sum(model.load_report.weight_parts.values())
    print(f"\nplanned {model.plan.weight_bytes:,} bytes of weights, loaded {loaded:,}")
try:
    ErnieModel.from_pretrained("ernie45/tiny-moe", memory="1MiB", device="cpu")
except OutOfMemoryError as error:
    print(f"refused: {error.message}")
