"""How much memory a step takes at GPT-2's size: own_model.py, and TRL's DPOTrainer beside it.

    python examples/memory.py FILE          some minutes and 8 GB; FILE keeps what other devices had

Needs requirements-trl.txt. The shape is that of the smallest GPT-2, 124M weights, here at random.
Two steps of two pairs of 512 tokens. TRL keeps the reference in memory, its default; own_model.py
has its log-probabilities alone. Each run is a process of its own: on a GPU its figure is what torch
had allocated there at most, in float32 and bfloat16; without one what the process ever held.
"""
import json
import os
import resource
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("HF_HUB_OFFLINE", "1")     # or TRL would report each run to the Hub

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lab import run

GPT2 = dict(vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12)


def write_model(folder, shape):
    """A GPT-2 with random weights, a tokenizer of as many words, and feedback.jsonl: pairs."""
    end = shape["vocab_size"] - 1
    GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=end, eos_token_id=end)).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(end + 1)}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token=f"w{end}",
                            pad_token=f"w{end}").save_pretrained(folder)
    half = shape["n_positions"] // 4                             # the end of text is the last token
    row = dict(prompt=" w0" * half, chosen=" w1" * (half - 1), rejected=" w2" * (half - 1))
    Path(folder, "feedback.jsonl").write_text(4 * (json.dumps(row) + "\n"), encoding="utf-8")


def measure(by, bf16, folder):
    """Two steps of a trainer, and a row of the file: what this process has held."""
    gpu, path = torch.cuda.is_available(), Path(folder, "feedback.jsonl")
    flags = dict(output_dir=f"{folder}/out", max_steps=2, per_device_train_batch_size=2, bf16=bf16,
                 use_cpu=not gpu, logging_steps=1, save_strategy="no", report_to="none")
    if by == "TRL":
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer
        rows = [json.loads(line) for line in open(path, encoding="utf-8")]
        DPOTrainer(GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32),
                   args=DPOConfig(**flags, activation_checkpointing=False),
                   train_dataset=Dataset.from_list(rows),
                   processing_class=PreTrainedTokenizerFast.from_pretrained(folder)).train()
    else:
        import own_model
        flags |= dict(model=folder, data=path, heldout=0, per_device_eval_batch_size=2)
        own_model.main([f"--{name}={value}" for name, value in flags.items()])
    unit = 1 if sys.platform == "darwin" else 1024
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return dict(by=by, bf16=bf16, bytes=torch.cuda.max_memory_allocated() if gpu else held)


def main(path, shape=GPT2):
    gpu = torch.cuda.is_available()                              # a CPU is slow in bfloat16
    with TemporaryDirectory() as folder, ProcessPoolExecutor(1, max_tasks_per_child=1) as pool:
        write_model(folder, shape)
        runs = [pool.submit(measure, by, bf16, folder).result()
                for by in ("own_model.py", "TRL") for bf16 in (False, True)[:1 + gpu]]
    told = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    device = torch.cuda.get_device_name() if gpu else "cpu"
    run.write_json(path, told | {device: dict(versions=run.versions(), shape=shape, runs=runs)})


if __name__ == "__main__":
    main(Path(sys.argv[1])) if len(sys.argv) == 2 else sys.exit(__doc__)
