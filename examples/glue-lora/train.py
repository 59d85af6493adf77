#!/usr/bin/env python3
"""Train the bundled LoRA experts: one per GLUE task, all from all-MiniLM-L6-v2.

    python examples/glue-lora/train.py DATA OUT --base BASE [--task cola --task sst2 ...]

DATA  holds `<task>/{train,test}.jsonl.gz`, one JSON object a line, as GLUE names its columns.
OUT   gets one PEFT adapter folder per task (`adapter_config.json`, `adapter_model.safetensors` in
      float16) and `<task>/score.json`: scores on the validation and test rows, measured after
      saving and loading again.

The last epoch is kept. The bundled adapters: `--lr 5e-4 --rows 7500` for cola and `--lr 3e-4` for
stsb, each after a first run at 1e-3 (docs/log.md), the defaults for the others. Test rows are read
only for the score. `--score-only` measures adapters that are there already.
Needs the extras `peft` and `eval`. About six minutes a task on one core.
"""

from __future__ import annotations

import argparse
import gzip
import json
import platform
import random
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import AutoModelForSequenceClassification, AutoTokenizer

# columns, labels (one label: regression) and epochs; the small tasks take more epochs
TASKS = {
    "cola": (("sentence",), ("unacceptable", "acceptable"), 4),
    "sst2": (("sentence",), ("negative", "positive"), 3),
    "mrpc": (("sentence1", "sentence2"), ("not_equivalent", "equivalent"), 4),
    "stsb": (("sentence1", "sentence2"), ("similarity",), 3),
    "qqp": (("question1", "question2"), ("not_duplicate", "duplicate"), 3),
    "mnli": (("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), 3),
    "qnli": (("question", "sentence"), ("entailment", "not_entailment"), 3),
    "rte": (("sentence1", "sentence2"), ("entailment", "not_entailment"), 5),
}
BASE_NAME = "sentence-transformers/all-MiniLM-L6-v2"
MAX_TOKENS = 96


def read(path: Path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def encode(tokenizer, rows: list[dict], columns: tuple[str, ...]) -> dict[str, torch.Tensor]:
    texts = [[row[column] for row in rows] for column in columns]
    return tokenizer(
        *texts, truncation=True, max_length=MAX_TOKENS, padding=True, return_tensors="pt"
    )


def score(task: str, logits: torch.Tensor, labels: list[float]) -> float:
    """GLUE's own metric of a task; two metrics are averaged."""
    if task == "stsb":
        guess = logits[:, 0].numpy()
        linear: Any = pearsonr(guess, labels)
        ranked: Any = spearmanr(guess, labels)
        return float(linear[0] + ranked[0]) / 2
    guess = logits.argmax(-1).tolist()
    if task == "cola":
        return float(matthews_corrcoef(labels, guess))
    accuracy = float(accuracy_score(labels, guess))
    return (accuracy + float(f1_score(labels, guess))) / 2 if task in ("mrpc", "qqp") else accuracy


@torch.inference_mode()
def predict(model, tokenizer, rows, columns) -> torch.Tensor:
    model.eval()
    batches = [rows[i : i + 64] for i in range(0, len(rows), 64)]
    return torch.cat([model(**encode(tokenizer, b, columns)).logits.float() for b in batches])


def batches_of(rows: list[dict], columns, size: int, rng: random.Random) -> list[list[dict]]:
    """Shuffled batches of rows of similar length (sorted in pools of 16 batches): less padding."""
    rows = rng.sample(rows, len(rows))
    out = []
    for start in range(0, len(rows), size * 16):
        pool = sorted(
            rows[start : start + size * 16], key=lambda r: sum(len(r[c]) for c in columns)
        )
        out += [pool[i : i + size] for i in range(0, len(pool), size)]
    rng.shuffle(out)
    return out


def load_base(base: str, labels: tuple[str, ...]):
    return AutoModelForSequenceClassification.from_pretrained(
        base,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        problem_type="regression" if len(labels) == 1 else "single_label_classification",
    )


def train(task: str, data: Path, out: Path, args: argparse.Namespace) -> dict:
    columns, labels, epochs = TASKS[task]
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    rows = read(data / task / "train.jsonl.gz")[: args.rows]
    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=args.rank,
        lora_alpha=2 * args.rank,
        lora_dropout=0.05,
        target_modules=["query", "key", "value", "dense"],
    )
    model = get_peft_model(load_base(args.base, labels), lora)
    steps = epochs * -(-len(rows) // args.batch)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=args.lr, weight_decay=0.01)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    started, step = time.perf_counter(), 0
    for epoch in range(epochs):
        model.train()
        for batch in batches_of(rows, columns, args.batch, rng):
            truth = torch.tensor([row["label"] for row in batch])
            logits = model(**encode(tokenizer, batch, columns)).logits
            if len(labels) == 1:
                loss = torch.nn.functional.mse_loss(logits[:, 0], truth.float())
            else:
                loss = torch.nn.functional.cross_entropy(logits, truth)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            if step % 50 == 0:
                took = time.perf_counter() - started
                print(
                    f"{task}: epoch {epoch + 1}/{epochs} step {step}/{steps} "
                    f"loss {loss.item():.3f} {took:.0f} s",
                    flush=True,
                )
    seconds = time.perf_counter() - started
    folder = out / task
    model.peft_config["default"].base_model_name_or_path = BASE_NAME
    model.save_pretrained(str(folder))
    weights = folder / "adapter_model.safetensors"
    save_file({k: v.half() for k, v in load_file(weights).items()}, weights, {"format": "pt"})
    (folder / "README.md").unlink(missing_ok=True)
    return measure(task, data, folder, args) | {"train_seconds": round(seconds)}


def measure(task: str, data: Path, folder: Path, args: argparse.Namespace) -> dict:
    """Score a saved adapter on validation and test rows; writes `score.json` beside it."""
    columns, labels, epochs = TASKS[task]
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    saved = PeftModel.from_pretrained(load_base(args.base, labels), folder)
    train_rows = len(read(data / task / "train.jsonl.gz")[: args.rows])
    scores = {}
    for split in ("validation", "test"):
        rows = read(data / task / f"{split}.jsonl.gz")
        logits = predict(saved, tokenizer, rows, columns)
        scores[f"{split}_score"] = round(score(task, logits, [row["label"] for row in rows]), 4)
        scores[f"{split}_rows"] = len(rows)
    result = {
        "task": task,
        "labels": labels,
        "columns": columns,
        **scores,
        "train_rows": train_rows,
        "epochs": epochs,
        "rank": args.rank,
        "learning_rate": args.lr,
        "batch": args.batch,
        "seed": args.seed,
        "max_tokens": MAX_TOKENS,
        "threads": torch.get_num_threads(),
        "cpu": platform.processor() or platform.machine(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    (folder / "score.json").write_text(json.dumps(result, indent=2) + "\n")
    print(
        f"{task}: validation {result['validation_score']}, test {result['test_score']}", flush=True
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--base", default=BASE_NAME, help="folder or hub id of all-MiniLM-L6-v2")
    parser.add_argument("--task", action="append", choices=sorted(TASKS), help="default: all eight")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3, help="stsb: 3e-4")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rows", type=int, default=5000, help="training rows per task, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--score-only", action="store_true", help="no training: score OUT again")
    args = parser.parse_args()
    for task in args.task or TASKS:
        if args.score_only:
            measure(task, args.data, args.out / task, args)
        else:
            train(task, args.data, args.out, args)


if __name__ == "__main__":
    main()
