"""TRL's DPOTrainer and KTOTrainer on the toy, to be measured against its exact optimum.

    pip install -r requirements.txt -r examples/requirements-trl.txt
    python examples/toy_as_transformers.py DIR
    python examples/trl_on_toy.py DIR --method dpo --learning_rate 4e-3 --beta 0.25 --out FOLDER
    python examples/toy_as_transformers.py DIR --evaluate FOLDER

All but the loss is as in train.py: the same batches in the same order, Adam without weight decay,
the gradient cut to norm 1, two ramps of the learning rate, float32, no dropout. beta is the loss's
own; --batch counts responses.
"""
import itertools
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")     # or TRL would report each run to the Hub

import torch
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from lab import run


def read(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def in_batches(rows, size, steps, seed):
    """The rows of `steps` batches of size, one after the other, as data.stored_batches has them."""
    batches = data.shuffled(torch.arange(len(rows)), size, torch.Generator().manual_seed(seed))
    return [rows[i] for batch in itertools.islice(batches, steps) for i in batch.tolist()]


def trainer_of(folder, method, learning_rate, beta, steps, batch, seed, out):
    """TRL's trainer for the toy in folder; method is "dpo" or "kto".

    KTO's reference point z_0 is not quite train.py's. Both are the mean log pi/pi_ref of as many
    mismatched responses as a batch has, and at least 0. TRL gives each prompt of the batch the
    response in front of it, which answers the same prompt one time in twelve. In train.py it always
    answers another, and is of another place in the feedback.
    """
    count = len(read(Path(folder, "binary.jsonl")))
    rows = read(Path(folder, "pairs.jsonl" if method == "dpo" else "binary.jsonl"))
    # Pairs of two identical responses are left out: so a batch has no more than batch / 2 pairs.
    size = min(len(rows), max(1, round(batch * len(rows) / count)))
    rows = in_batches(rows, size, steps, seed)
    tokenizer = AutoTokenizer.from_pretrained(Path(folder, "reference"))
    texts = [{name: tokenizer.decode(part) if isinstance(part, list) else part
              for name, part in row.items()} for row in rows]
    model = AutoModelForCausalLM.from_pretrained(Path(folder, "reference"), dtype=torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, betas=(0.9, 0.99),
                                 fused=True)
    ramps = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: (
        min(1.0, (done + 1) / (0.05 * steps)) * (1 - done / steps)))
    config, trainer = dict(dpo=(DPOConfig, DPOTrainer), kto=(KTOConfig, KTOTrainer))[method]
    settings = config(
        output_dir=out, seed=seed, beta=beta, max_steps=steps, per_device_train_batch_size=size,
        train_sampling_strategy="sequential",                    # they are shuffled already
        # TRL takes texts, and appends end-of-text to those without it: to responses that were cut
        # off. There it is one token too many, and is cut off again.
        max_length=data.PROMPT_TOKENS + data.MAX_TOKENS,
        precompute_ref_log_probs=True, max_grad_norm=1.0,
        bf16=False, activation_checkpointing=False, use_cpu=True,  # TRL's defaults: the opposite
        report_to="none", save_strategy="no", logging_steps=max(1, steps // 10),
        logging_first_step=True)
    return trainer(model=model, args=settings, train_dataset=Dataset.from_list(texts),
                   processing_class=tokenizer, optimizers=(optimizer, ramps))


def main(arguments=None):
    parser = run.Parser("trl_on_toy.py", description="TRL on the toy.")
    parser.add_argument("folder", metavar="DIR", help="toy_as_transformers.py's")
    parser.add_argument("--method", choices=("dpo", "kto"), required=True)
    parser.add_argument("--learning_rate", type=float, required=True)
    parser.add_argument("--beta", type=float, required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=192)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, help="folder for the policy")
    given = vars(parser.parse_args(arguments))
    if not Path(given["folder"], "toy.json").is_file():
        parser.error(f"{given['folder']} has no toy.json: toy_as_transformers.py writes it")
    torch.set_num_threads(1)
    disable_progress_bars()
    trainer = trainer_of(**given)
    trainer.train()
    trainer.model.save_pretrained(given["out"])


if __name__ == "__main__":
    main()
