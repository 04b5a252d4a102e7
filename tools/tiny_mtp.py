"""The head that predicts one token further (multi-token prediction), trained on the frozen model.

As in Baidu's training code (ERNIEKit 1.0.1, ernie/modeling_moe.py): position i takes the last layer's output of
the trunk, before the final norm, and the embedding of token i + 1; each is normalised, the embedding comes first
in the concatenation, and [2h] -> h, one dense decoder layer and the trunk's final norm and output matrix give the
logits of token i + 2. (Baidu's FastDeploy hands the head the state after the final norm instead.)
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from tiny_examples import EXAMPLES_PER_STEP, draw_examples, encode_task, task_weights
from tiny_family import TinyModel
from tiny_optimizer import TinyOptimizer, sum_over_processes
from tiny_training import Pass, Trainer, answer_logits, make_passes, rate_factor
from torch import Tensor, nn
from torch.nn import functional
from transformers import Ernie4_5_MoeConfig
from transformers.masking_utils import create_causal_mask
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeDecoderLayer, Ernie4_5_MoeRMSNorm

from ernie45.testing.tasks import tasks

ITEMS_PER_TASK: Final = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadLogits:
    """The head's logits [N, V] for every answer token but a row's first, and what they are compared with.

    `targets` [N] are the right tokens, `trunk_tokens` [N] those the trunk itself puts on top one step later,
    and `weights` [N] weigh the loss.
    """

    logits: Tensor
    targets: Tensor
    trunk_tokens: Tensor
    weights: Tensor


class MtpHead(nn.Module):
    """The head's own weights, named as in the published -PT checkpoints but for the leading "model."."""

    def __init__(self, config: Ernie4_5_MoeConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.mtp_emb_norm = nn.ModuleList([Ernie4_5_MoeRMSNorm(width, config.rms_norm_eps)])
        self.mtp_hidden_norm = nn.ModuleList([Ernie4_5_MoeRMSNorm(width, config.rms_norm_eps)])
        self.mtp_linear_proj = nn.ModuleList([nn.Linear(2 * width, width, bias=False)])
        self.mtp_block = nn.ModuleList([Ernie4_5_MoeDecoderLayer(config, layer_idx=0)])  # layer 0 is a dense one

    def forward(self, hidden: Tensor, embedded: Tensor, rotary: nn.Module) -> Tensor:
        """States [B, T, h] before the final norm, of trunk states [B, T, h] and the next tokens' embeddings."""
        normed = [self.mtp_emb_norm[0](embedded), self.mtp_hidden_norm[0](hidden)]
        states = self.mtp_linear_proj[0](torch.cat(normed, dim=-1))
        positions = torch.arange(states.shape[1])[None]
        mask = create_causal_mask(
            config=self.config, inputs_embeds=states, attention_mask=None, past_key_values=None, position_ids=positions
        )
        block: nn.Module = self.mtp_block[0]
        out: Tensor = block(
            states, attention_mask=mask, position_ids=positions, position_embeddings=rotary(states, positions)
        )
        return out


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedHead:
    """A head and how it came out: `acceptance` is what `measure_acceptance` gave."""

    head: MtpHead
    num_steps: int
    seconds: float
    acceptance: dict[str, float]


def head_logits(head: MtpHead, model: TinyModel, batch: Pass) -> HeadLogits:
    """Run the trunk without gradients, then the head over whole rows, their shared prefix included."""
    parts: list[Tensor] = []  # of the prefix, where there is one, and of the rows
    hook = model.model.norm.register_forward_pre_hook(lambda _module, args: parts.append(args[0]))
    with torch.no_grad():
        trunk_tokens = answer_logits(model, batch).argmax(-1)
    hook.remove()
    num_rows = len(batch.ids)
    hidden = torch.cat([part.expand(num_rows, -1, -1) for part in parts], dim=1)
    ids = torch.cat([torch.tensor(batch.prefix, dtype=torch.long).expand(num_rows, -1), batch.ids], dim=1)
    states = head(hidden[:, :-1], model.model.embed_tokens(ids[:, 1:]), model.model.rotary_emb)
    # The head stands where the trunk predicts the token before its own; a row's first has none in the answer.
    later = batch.rows[1:] == batch.rows[:-1]
    places = len(batch.prefix) + batch.columns[:-1][later]
    logits = model.lm_head(model.model.norm(states[batch.rows[1:][later], places])).float()
    return HeadLogits(
        logits=logits,
        targets=batch.targets[1:][later],
        trunk_tokens=trunk_tokens[1:][later],
        weights=batch.weights[1:][later],
    )


def train_mtp(trainer: Trainer, num_steps: int) -> TrainedHead:
    """Train a head for a finished model on the items that the main run would have drawn next.

    Every process takes part. The model's own weights are frozen for good.
    """
    torch.manual_seed(trainer.seed)
    model = trainer.model.requires_grad_(False)
    head = MtpHead(model.config)
    optimizer = TinyOptimizer(head)
    weights = task_weights(trainer.names, trainer.accuracy, trainer.emphasis)
    started = time.monotonic()
    for step in range(num_steps):
        seed = trainer.seed * 1_000_003 + trainer.num_steps + step
        drawn = draw_examples(trainer.prompts, trainer.tokenizer, weights, seed, 1.0)
        drawn.sort(key=lambda example: len(example.ids) - example.num_shared)
        total = torch.zeros(1)
        for batch in make_passes(drawn[dist.get_rank() :: dist.get_world_size()]):
            with torch.autocast("cpu", torch.bfloat16):
                out = head_logits(head, model, batch)
            loss = (functional.cross_entropy(out.logits, out.targets, reduction="none") * out.weights).sum()
            loss = loss / EXAMPLES_PER_STEP
            loss.backward()
            total += loss.detach()
        optimizer.step(rate_factor(step, num_steps))
        sum_over_processes([total])
        if (step + 1) % 20 == 0:
            seconds = time.monotonic() - started
            trainer.log(f"mtp step {step + 1} loss {float(total):.4f} seconds {seconds:.0f}")
    acceptance = measure_acceptance(head, trainer)
    shown = " ".join(f"{name} {share:.2f}" for name, share in acceptance.items())
    trainer.log(f"== mtp step {num_steps} accepted: {shown} mean {sum(acceptance.values()) / len(acceptance):.3f}")
    return TrainedHead(head=head, num_steps=num_steps, seconds=time.monotonic() - started, acceptance=acceptance)


def measure_acceptance(head: MtpHead, trainer: Trainer) -> dict[str, float]:
    """Share of answer tokens, per task on unseen items, where the head's choice is the trunk's own one step later."""
    counts = torch.zeros(2, len(trainer.names))  # tokens, and those on which they agree
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for place, name in enumerate(trainer.names):
            drawn = tasks(name, ITEMS_PER_TASK, seed=trainer.seed, split="test")
            mine = drawn[dist.get_rank() :: dist.get_world_size()]
            for batch in make_passes([encode_task(trainer.prompts, name, task) for task in mine]):
                out = head_logits(head, trainer.model, batch)
                counts[0, place] += len(out.targets)
                counts[1, place] += (out.logits.argmax(-1) == out.trunk_tokens).sum()
    sum_over_processes([counts])
    return {name: float(counts[1, place] / counts[0, place]) for place, name in enumerate(trainer.names)}


def add_to_folder(head: MtpHead, folder: Path) -> None:
    """Put the head, in bfloat16, into a saved model's weights, and its number into the configuration."""
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    tensors |= {f"model.{name}": tensor.bfloat16() for name, tensor in head.state_dict().items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["num_nextn_predict_layers"] = len(head.mtp_block)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
