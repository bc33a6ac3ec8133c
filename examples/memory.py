"""How much memory a step takes at GPT-2's size: own_model.py, and TRL's DPOTrainer beside it.

    pip install -r requirements.txt -r examples/requirements.txt -r examples/requirements-trl.txt
    python examples/memory.py FILE          some minutes and 8 GB; FILE keeps what other devices had

The shape is that of the smallest GPT-2, 124M weights, here at random: nothing is downloaded. Two
steps of two pairs of 512 tokens. TRL keeps the reference in memory, its default; own_model.py has
its log-probabilities alone. Each run is a process of its own: on a GPU its figure is the most that
torch had allocated there, in float32 and bfloat16; without one the most that the process ever held.
"""
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lab import run

GPT2 = dict(vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12)


def write_model(folder, shape):
    """A GPT-2 with random weights, a tokenizer of as many words, and pairs.jsonl."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, set_seed

    set_seed(0)
    end = shape["vocab_size"] - 1
    GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=end, eos_token_id=end)).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(end + 1)}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token=f"w{end}",
                            pad_token=f"w{end}").save_pretrained(folder)
    half, rng = shape["n_positions"] // 4, random.Random(0)      # the end of text is the last token
    texts = [["".join(f" w{rng.randrange(end)}" for _ in range(length))
              for length in (half, half - 1, half - 1)] for _ in range(4)]
    Path(folder, "pairs.jsonl").write_text("".join(json.dumps(dict(zip(
        ("prompt", "chosen", "rejected"), three))) + "\n" for three in texts), encoding="utf-8")


def train_own_model(folder, bf16, out):
    import own_model
    own_model.main(["--model", folder, "--data", f"{folder}/pairs.jsonl", "--heldout", "0",
                    "--max_steps", "2", "--per_device_train_batch_size", "2", "--bf16", str(bf16),
                    "--per_device_eval_batch_size", "2", "--logging_steps", "1",
                    "--save_strategy", "no", "--report_to", "none", "--output_dir", out,
                    *([] if torch.cuda.is_available() else ["--use_cpu", "True"])])


def train_trl(folder, bf16, out):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    rows = [json.loads(line) for line in open(f"{folder}/pairs.jsonl", encoding="utf-8")]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = DPOConfig(output_dir=out, max_steps=2, per_device_train_batch_size=2, bf16=bf16,
                       activation_checkpointing=False, logging_steps=1, save_strategy="no",
                       report_to="none", use_cpu=not torch.cuda.is_available())
    DPOTrainer(model=model, args=config, train_dataset=Dataset.from_list(rows),
               processing_class=AutoTokenizer.from_pretrained(folder)).train()


TRAINERS = {"own_model.py": train_own_model, "TRL": train_trl}


def peak():
    """Bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(by, bf16, folder):
    """A row of the file: what train_... of a process of its own has held."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, __file__, by, str(int(bf16)), folder, out]
        told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True,
                              env=os.environ | dict(HF_HUB_OFFLINE="1"))
    return dict(by=by, bf16=bf16, bytes=int(told.stdout.splitlines()[-1]))


def main(path, shape=GPT2):
    with tempfile.TemporaryDirectory() as folder:
        write_model(folder, shape)
        gpu = torch.cuda.is_available()                          # a CPU is slow in bfloat16
        runs = [measure(by, bf16, folder) for by in TRAINERS for bf16 in (False, True)[:1 + gpu]]
    device = torch.cuda.get_device_name() if gpu else "cpu"
    told = json.loads(Path(path).read_text(encoding="utf-8")) if os.path.exists(path) else {}
    run.write_json(path, told | {device: dict(versions=run.versions(), shape=shape, runs=runs)})


if __name__ == "__main__":
    if len(sys.argv) == 5:                                       # measure's process
        by, bf16, folder, out = sys.argv[1:]
        TRAINERS[by](folder, bf16 == "1", out)
        print(peak())
    elif len(sys.argv) == 2 and not sys.argv[1].startswith("-"):
        main(sys.argv[1])
    else:
        sys.exit(__doc__)
