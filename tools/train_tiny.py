"""Train the built-in model ernie45/tiny-dense, evaluate it and write its folder.

    python tools/train_tiny.py --steps 5000 --checkpoint build/tiny-dense.pt

The run is repeatable: tasks, weights and batches follow from `--seed`, the number of steps and of processes.
With `--checkpoint` a stopped run continues where it was when the same command is given again.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist
from tiny_card import evaluate_folder, write_card
from tiny_tokenizer import TinyTokenizer, train_sentencepiece
from tiny_training import Trainer
from transformers import Ernie4_5Config, Ernie4_5ForCausalLM, GenerationConfig

ROOT: Final = Path(__file__).parents[1]
MODEL_NAME: Final = "ernie45/tiny-dense"
FOLDER: Final = ROOT / "src/ernie45/assets/tiny/tiny-dense"
NUM_ROWS: Final = 2048  # a little more than the tokenizer has, as in the published checkpoints


def build_model(seed: int) -> Ernie4_5ForCausalLM:
    """The model with seeded fresh weights, in float32."""
    torch.manual_seed(seed)
    config = Ernie4_5Config(
        vocab_size=NUM_ROWS,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        use_bias=False,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        attn_implementation="eager",
    )
    return Ernie4_5ForCausalLM(config)


def train_worker(rank: int, options: argparse.Namespace, model_bytes: bytes, meeting: str) -> None:
    """One of the training processes; the first writes the folder."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=options.processes,
        timeout=timedelta(minutes=10),
    )

    def log(line: str) -> None:
        if rank == 0:
            print(line, flush=True)

    tokenizer = TinyTokenizer(model_bytes)
    trainer = Trainer(build_model(options.seed), tokenizer, num_steps=options.steps, seed=options.seed, log=log)
    if options.checkpoint is not None and options.checkpoint.exists():
        trainer.load(options.checkpoint)
        log(f"continuing from step {trainer.step}")
    trainer.run(
        checkpoint=options.checkpoint,
        evaluate_every=options.evaluate_every,
        stop_at=min(options.steps, options.stop_at or options.steps),
    )
    dist.destroy_process_group()
    if rank == 0 and trainer.step == options.steps:
        save_folder(trainer, options)


def save_folder(trainer: Trainer, options: argparse.Namespace) -> None:
    """Write weights, configuration, tokenizer and card, and log the final evaluation."""
    folder = options.output
    folder.mkdir(parents=True, exist_ok=True)
    model = trainer.model
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.8, top_p=0.8, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes it for its owner alone
    trainer.tokenizer.save(folder)
    template = Path(__file__).with_name("tiny_chat_template.jinja").read_text(encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    results = evaluate_folder(folder, trainer.tokenizer, MODEL_NAME, num_items=options.test_items, seed=options.seed)
    write_card(
        folder,
        results,
        trainer.history,
        num_items=options.test_items,
        seed=options.seed,
        command=options.command,
    )
    for name, share in results.items():
        trainer.log(f"final {name} {share:.3f}")


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, required=True, help="length of the whole schedule")
    parser.add_argument("--stop-at", type=int, help="stop after this step (a trial: writes no folder)")
    parser.add_argument("--seed", type=int, default=45)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--evaluate-every", type=int, default=340, help="steps from one evaluation and checkpoint to the next"
    )
    parser.add_argument("--test-items", type=int, default=200, help="unseen items per task at the end")
    parser.add_argument("--checkpoint", type=Path, help="file that keeps the state of the run")
    parser.add_argument("--output", type=Path, default=FOLDER)
    options = parser.parse_args()
    options.command = (
        f"python tools/train_tiny.py --steps {options.steps} --seed {options.seed} --processes {options.processes}"
    )
    return options


def main() -> None:
    """Train with one process per core."""
    options = read_options()
    model_bytes = train_sentencepiece(MODEL_NAME)
    with tempfile.TemporaryDirectory() as folder:
        meeting = os.path.join(folder, "meeting")
        context = multiprocessing.get_context("spawn")
        workers = [
            context.Process(target=train_worker, args=(rank, options, model_bytes, meeting))
            for rank in range(options.processes)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    if any(worker.exitcode for worker in workers):
        sys.exit("a training process failed")


if __name__ == "__main__":
    main()
