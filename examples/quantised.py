"""A model in fewer bytes: presets by name, one of your own, a KV cache of half the size; saved, and loaded again."""

import tempfile
from pathlib import Path

from ernie45 import ErnieModel, QuantPreset

question = {"role": "user", "content": "What is 12 + 30 + 9?"}
experts_only = QuantPreset(name="experts only", experts="int4")

for preset in ("none", "int8", "int4", experts_only):
    with ErnieModel.from_pretrained("ernie45/tiny-moe", quantization=preset) as model:
        experts = model.load_report.weight_parts["routed_experts"]
        sizes = f"{model.plan.weight_bytes / 1e6:.1f} MB, of which routed experts {experts / 1e6:.1f}"
        print(f"{model.plan.preset:12} {sizes}: {model.chat([question], temperature=0).text}")

with tempfile.TemporaryDirectory() as folder:
    with ErnieModel.from_pretrained("ernie45/tiny-moe", quantization="int4") as model:
        expected = model.logits("12 + 30 + 9 =")
        model.save_pretrained(folder)
    stored = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    with ErnieModel.from_pretrained(folder) as again:
        is_same = again.logits("12 + 30 + 9 =").equal(expected)
        print(f"\nsaved as {again.plan.preset}, {stored / 1e6:.1f} MB; the same logits when loaded again: {is_same}")

print()
for kv_dtype in ("auto", "int8"):
    with ErnieModel.from_pretrained("ernie45/tiny-moe", kv_dtype=kv_dtype, context_tokens=4096, max_batch=8) as model:
        size = f"{model.plan.kv_bytes / 2**20:.1f} MiB"
        print(f"KV cache in {model.plan.kv_dtype}: {size}: {model.chat([question], temperature=0).text}")
