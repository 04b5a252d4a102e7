"""Train a built-in model of the tiny family, evaluate it and write its folder.

    python tools/train_tiny.py tiny-dense --steps 3400 --checkpoint build/tiny-dense.pt

The run is repeatable: tasks, weights and batches follow from `--seed`, the number of steps and of processes.
With `--checkpoint` a stopped run continues where it was when the same command is given again. A member that
has a head for multi-token prediction gets it at the end, in one go.
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
from tiny_examples import PRIORS
from tiny_family import MEMBERS, Member
from tiny_media import write_processor_files
from tiny_mtp import TrainedHead, add_to_folder, train_mtp
from tiny_prompts import PicturePrompts
from tiny_tokenizer import TinyTokenizer, train_sentencepiece
from tiny_training import Trainer
from transformers import GenerationConfig

ROOT: Final = Path(__file__).parents[1]
ASSETS: Final = ROOT / "src/ernie45/assets/tiny"


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
    member = MEMBERS[options.member]
    torch.manual_seed(options.seed)
    trainer = Trainer(
        member,
        member.build(),
        tokenizer,
        num_steps=options.steps,
        seed=options.seed,
        emphasis=dict(options.emphasis),
        log=log,
    )
    if options.checkpoint is not None and options.checkpoint.exists():
        trainer.load(options.checkpoint)
        log(f"continuing from step {trainer.step}")
    trainer.run(
        checkpoint=options.checkpoint,
        evaluate_every=options.evaluate_every,
        stop_at=min(options.steps, options.stop_at or options.steps),
    )
    is_finished = trainer.step == options.steps
    trained = train_mtp(trainer, member.mtp_steps) if is_finished and member.mtp_steps else None
    dist.destroy_process_group()
    if rank == 0 and is_finished:
        save_folder(member, trainer, trained, options)


def save_folder(member: Member, trainer: Trainer, trained: TrainedHead | None, options: argparse.Namespace) -> None:
    """Write weights, configuration, tokenizer and card, and log the final evaluation."""
    folder = options.output or ASSETS / options.member
    folder.mkdir(parents=True, exist_ok=True)
    model = trainer.model
    stop_id = trainer.prompts.stop_id
    eos_ids = 2 if stop_id == 2 else [2, stop_id]
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.8, top_p=0.8, bos_token_id=1, eos_token_id=eos_ids, pad_token_id=0
    )
    for name, parameter in model.named_parameters():
        if ".gate." not in name:  # routers stay in float32, as published
            parameter.data = parameter.data.bfloat16()
    for config in (model.config, *(getattr(model.config, name) for name in model.config.sub_configs)):
        config.dtype = torch.bfloat16
    model.save_pretrained(folder)
    if isinstance(trainer.prompts, PicturePrompts):
        write_processor_files(folder)
    if trained is not None:
        add_to_folder(trained.head, folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes it for its owner alone
    trainer.tokenizer.save(folder)
    (folder / "chat_template.jinja").write_text(trainer.prompts.template, encoding="utf-8")
    results = evaluate_folder(folder, member, trainer.tokenizer, num_items=options.test_items, seed=options.seed)
    write_card(
        folder,
        member,
        results,
        trainer.history,
        trained,
        num_items=options.test_items,
        seed=options.seed,
        command=options.command,
    )
    for name, share in results.exact.items():
        trainer.log(f"final {name} {share:.3f}")


def read_emphasis(text: str) -> tuple[str, float]:
    """One `TASK=FACTOR` of the command line."""
    name, _, factor = text.partition("=")
    if name not in PRIORS:
        raise argparse.ArgumentTypeError(f"unknown task {name!r}; the tasks are {', '.join(PRIORS)}")
    return name, float(factor)


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("member", choices=sorted(MEMBERS))
    parser.add_argument("--steps", type=int, required=True, help="length of the whole schedule")
    parser.add_argument("--stop-at", type=int, help="stop after this step (a trial: writes no folder)")
    parser.add_argument("--seed", type=int, default=45)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--emphasis", type=read_emphasis, nargs="+", default=[], metavar="TASK=FACTOR", help="tasks to draw more often"
    )
    parser.add_argument(
        "--evaluate-every", type=int, default=340, help="steps from one evaluation and checkpoint to the next"
    )
    parser.add_argument("--test-items", type=int, default=200, help="unseen items per task at the end")
    parser.add_argument("--checkpoint", type=Path, help="file that keeps the state of the run")
    parser.add_argument("--output", type=Path, help="folder to write (default: the package's own)")
    options = parser.parse_args()
    options.command = (
        f"python tools/train_tiny.py {options.member} --steps {options.steps} --seed {options.seed}"
        f" --processes {options.processes}"
    )
    if options.emphasis:
        options.command += " --emphasis " + " ".join(f"{name}={factor:g}" for name, factor in options.emphasis)
    return options


def main() -> None:
    """Train with one process per core."""
    options = read_options()
    model_bytes = train_sentencepiece()
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
