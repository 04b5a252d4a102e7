"""Models larger than memory: what a limit leaves in it, what a token then reads from disk, and what routers choose."""

from ernie45 import ErnieModel, plan_memory

for name, limits in (
    ("ERNIE-4.5-21B-A3B-PT", ("4GiB", "6GiB", "8GiB", "12GiB")),
    ("ERNIE-4.5-300B-A47B-PT", ("8GiB", "24GiB", "64GiB")),
):
    print(f"{name} as int4")
    for memory in limits:
        plan = plan_memory(
            name, quantization="int4", memory=memory, device="cpu", dtype="bfloat16", context_tokens=4096, max_batch=1
        )
        if plan.expert_slots is None or plan.num_experts is None or plan.expert_read_bytes is None:
            print(f"  {memory:>5}: {plan.verdict}")
            continue
        held = f"{plan.expert_slots.text:,} of {plan.num_experts.text:,} experts in memory"
        print(f"  {memory:>5}: {plan.verdict}, {held}, {plan.expert_read_bytes / 1e9:.1f} GB read for a token")

# That is from the published files; in a folder that `ernie45 convert --quantization int4` wrote, experts are smaller:
# ErnieModel.from_pretrained("./ERNIE-4.5-21B-A3B-int4", memory="6GiB").

# The model in the package is too small to stream, but what a smaller memory would find of it can be told from a trace.
with ErnieModel.from_pretrained("ernie45/tiny-moe", device="cpu") as model, model.trace_routing() as recording:
    questions = [f"What is {number} + 30 + 9?" for number in range(10, 20)]
    model.batch_chat([[{"role": "user", "content": question}] for question in questions], temperature=0)
trace = recording.trace
print(f"\ntiny-moe, {trace.num_tokens():,} tokens through {len(trace.layers)} layers of {trace.num_experts} experts")
for slots in (6, 12, 24):
    print(f"  with {slots} in memory, {trace.replay(slots):.0%} would have been found there")
