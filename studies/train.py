#!/usr/bin/env python3
"""Train experts of one base: a LoRA adapter, or a full checkpoint, for each task.

    python studies/train.py DATA OUT --base BASE [--task cola --task sst2 ...] [--full]

DATA  holds `<task>/{train,validation,test}.jsonl.gz`, one JSON object a line, for tasks that
      `twinmerge.evaluation.tasks` knows.
OUT   gets one folder per task: a PEFT adapter in float16, or with `--full` a checkpoint in
      float32, and `score.json`: the scores on validation and test rows, measured after saving
      and loading again.

The bundled adapters of `examples/glue-lora` are of this script: `--lr 5e-4 --rows 7500` for cola,
`--lr 3e-4` for stsb, each after a first run at 1e-3 (docs/log.md), the defaults for the others, all
with `--base-name sentence-transformers/all-MiniLM-L6-v2` on a local copy of it.

The last epoch is kept: test rows are read for the score alone, validation rows choose nothing. A
task whose `score.json` is there is left as it is. `--score-only` measures what is there already;
what its `score.json` says of the training stays. Needs the extra `train`; takes a GPU where there
is one.
"""

from __future__ import annotations

import json
import platform
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from twinmerge.data import read_rows, text_of
from twinmerge.errors import InputError, TwinMergeError
from twinmerge.evaluation.metrics import metric
from twinmerge.evaluation.tasks import Task, known_tasks

BASE = "sentence-transformers/all-MiniLM-L6-v2"

EPOCHS = {"cola": 4, "mrpc": 4, "rte": 5, "tweet_irony": 5, "tweet_emotion": 5, "banking77": 6}
"""Small tasks, and one of 77 classes, take more than the others' three."""

SCORE = "score.json"

TRAINED = (
    "train_rows", "full", "rank", "learning_rate", "batch", "seed", "epochs", "train_seconds",
)  # fmt: skip
"""What `score.json` says of the training. The machine that it names is the one that scored."""


@dataclass(frozen=True)
class Settings:
    base: str
    base_name: str
    full: bool
    rank: int
    targets: tuple[str, ...]
    lr: float
    batch: int
    epochs: int | None
    rows: int
    max_tokens: int
    seed: int
    device: torch.device


@dataclass(frozen=True)
class Rows:
    """Texts and labels of one split, in order."""

    texts: list[tuple[str, ...]]
    labels: list[float]

    @staticmethod
    def read(data: Path, task: str, split: str, limit: int | None = None) -> Rows:
        """Raises `InputError` for a row without text or label."""
        file, columns = data / task / f"{split}.jsonl.gz", known_tasks()[task].columns
        rows = Rows([], [])
        for number, row in enumerate(read_rows(file)[:limit], start=1):
            text, label = text_of(row, columns), row.get("label")
            if not isinstance(text, tuple) or not isinstance(label, int | float):
                raise InputError(
                    f"{file}, row {number}: expected text and a number as `label`, got "
                    f"{type(text).__name__} and {label!r}."
                )
            rows.texts.append(text)
            rows.labels.append(float(label))
        return rows


def classes(task: str, data: Path) -> tuple[str, ...]:
    """Names of the classes; one name: a regression."""
    known = known_tasks()[task]
    if known.metric == "pearson_spearman":
        return ("score",)
    if known.labels:
        return known.labels
    table = read_rows(data / task / "train.jsonl.gz")
    names = {int(row["label"]): str(row["label_text"]) for row in table}
    return tuple(names[i] for i in range(len(names)))


def load_base(base: str, labels: tuple[str, ...]) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(
        base,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        problem_type="regression" if len(labels) == 1 else "single_label_classification",
    )


class Trainer:
    def __init__(self, task: str, data: Path, out: Path, settings: Settings) -> None:
        self.task, self.data, self.settings = task, data, settings
        self.folder = out / task
        self.known: Task = known_tasks()[task]
        self.labels = classes(task, data)
        self.tokenizer = AutoTokenizer.from_pretrained(settings.base)

    def encode(self, texts: list[tuple[str, ...]]) -> Any:
        columns = [list(column) for column in zip(*texts, strict=True)]
        found = self.tokenizer(
            *columns,
            truncation=True,
            max_length=self.settings.max_tokens,
            padding=True,
            return_tensors="pt",
        )
        return found.to(self.settings.device)

    def batches(self, rows: Rows, rng: random.Random) -> list[list[int]]:
        """Shuffled batches of rows of similar length (sorted in pools of 16): less padding."""
        order = rng.sample(range(len(rows.texts)), len(rows.texts))
        size, out = self.settings.batch, []
        for start in range(0, len(order), size * 16):
            pool = order[start : start + size * 16]
            pool.sort(key=lambda i: sum(map(len, rows.texts[i])))
            out += [pool[i : i + size] for i in range(0, len(pool), size)]
        rng.shuffle(out)
        return out

    def model(self) -> Any:
        model = load_base(self.settings.base, self.labels)
        if not self.settings.full:
            rank = self.settings.rank
            lora = LoraConfig(
                task_type=TaskType.SEQ_CLS,
                r=rank,
                lora_alpha=2 * rank,
                lora_dropout=0.05,
                target_modules=list(self.settings.targets),
            )
            model = get_peft_model(model, lora)
        return model.to(self.settings.device)

    def loss(self, logits: torch.Tensor, labels: list[float]) -> torch.Tensor:
        truth = torch.tensor(labels, device=logits.device)
        if len(self.labels) == 1:
            return torch.nn.functional.mse_loss(logits[:, 0], truth.float())
        return torch.nn.functional.cross_entropy(logits, truth.long())

    def run(self) -> None:
        settings = self.settings
        torch.manual_seed(settings.seed)
        rng = random.Random(settings.seed)
        rows = Rows.read(self.data, self.task, "train", settings.rows)
        epochs = settings.epochs or EPOCHS.get(self.task, 3)
        model = self.model()
        steps = epochs * -(-len(rows.texts) // settings.batch)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=0.01)
        schedule = transformers.get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
        started, step = time.perf_counter(), 0
        for _ in range(epochs):
            model.train()
            for batch in self.batches(rows, rng):
                logits = model(**self.encode([rows.texts[i] for i in batch])).logits
                loss = self.loss(logits, [rows.labels[i] for i in batch])
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                step += 1
                if step % 50 == 0:
                    seconds = time.perf_counter() - started
                    say(f"{self.task}: step {step}/{steps} loss {loss.item():.3f} {seconds:.0f} s")
        self.save(model)
        self.measure(
            {
                "train_rows": len(rows.labels),
                "full": settings.full,
                "rank": None if settings.full else settings.rank,
                "learning_rate": settings.lr,
                "batch": settings.batch,
                "seed": settings.seed,
                "epochs": epochs,
                "train_seconds": round(time.perf_counter() - started),
            }
        )

    def trained(self) -> dict[str, Any]:
        """What is known of the training of an expert that is there."""
        file = self.folder / SCORE
        found = json.loads(file.read_text()) if file.is_file() else {}
        return {name: found[name] for name in TRAINED if name in found}

    def save(self, model: Any) -> None:
        if self.settings.full:
            model.save_pretrained(str(self.folder))
            self.tokenizer.save_pretrained(str(self.folder))
            return
        model.save_pretrained(str(self.folder))
        config = self.folder / "adapter_config.json"
        said = json.loads(config.read_text())
        said["base_model_name_or_path"] = self.settings.base_name
        config.write_text(json.dumps(said, indent=2) + "\n")
        weights = self.folder / "adapter_model.safetensors"
        save_file({k: v.half() for k, v in load_file(weights).items()}, weights, {"format": "pt"})
        (self.folder / "README.md").unlink(missing_ok=True)

    def saved(self) -> Any:
        if self.settings.full:
            model = AutoModelForSequenceClassification.from_pretrained(self.folder)
        else:
            model = PeftModel.from_pretrained(
                load_base(self.settings.base, self.labels), self.folder
            )
        return model.to(self.settings.device).eval()

    @torch.inference_mode()
    def measure(self, trained: dict[str, Any]) -> None:
        """Score what was saved on validation and test rows; writes `score.json` beside it."""
        settings, model = self.settings, self.saved()
        score, scores = metric(self.known.metric), {}
        for split in ("validation", "test"):
            rows = Rows.read(self.data, self.task, split)
            parts = [rows.texts[i : i + 64] for i in range(0, len(rows.texts), 64)]
            logits = torch.cat([model(**self.encode(part)).logits.float() for part in parts])
            values = logits[:, 0] if len(self.labels) == 1 else logits.argmax(-1).float()
            scores[f"{split}_score"] = round(score(rows.labels, values.tolist()), 4)
            scores[f"{split}_rows"] = len(rows.labels)
        result = {
            "task": self.task,
            "labels": self.labels,
            "columns": self.known.columns,
            **scores,
            "metric": self.known.metric,
            **trained,
            "max_tokens": settings.max_tokens,
            "device": settings.device.type,
            "threads": torch.get_num_threads(),
            "cpu": platform.processor() or platform.machine(),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
        (self.folder / SCORE).write_text(json.dumps(result, indent=2) + "\n")
        say(f"{self.task}: validation {scores['validation_score']}, test {scores['test_score']}")


def say(text: str) -> None:
    typer.echo(text, err=True)


def main(
    data: Annotated[Path, typer.Argument(help="`<task>/{train,validation,test}.jsonl.gz`.")],
    out: Annotated[Path, typer.Argument(help="Gets one folder per task.")],
    base: Annotated[str, typer.Option(help="Folder or hub id.")] = BASE,
    base_name: Annotated[
        str | None, typer.Option(help="What adapters say their base is; default: --base.")
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="Default: all that DATA has.")] = None,
    full: Annotated[bool, typer.Option("--full", help="All weights, not an adapter.")] = False,
    rank: Annotated[int, typer.Option(help="Of the adapter.")] = 8,
    targets: Annotated[
        str, typer.Option(help="Layers that the adapter changes, by the end of their name.")
    ] = "query,key,value,dense",
    lr: Annotated[float | None, typer.Option(help="Default: 1e-3; 1e-4 with --full.")] = None,
    batch: Annotated[int, typer.Option()] = 32,
    epochs: Annotated[int | None, typer.Option(help="Default: 3 to 6, by task.")] = None,
    rows: Annotated[int, typer.Option(help="Train rows per task, at most.")] = 5000,
    max_tokens: Annotated[int, typer.Option()] = 96,
    seed: Annotated[int, typer.Option()] = 0,
    score_only: Annotated[bool, typer.Option("--score-only", help="No training.")] = False,
) -> None:
    """Train one expert for each task of DATA."""
    known = known_tasks()
    names = task or [name for name in known if (data / name).is_dir()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        what = f"no task {unknown[0]!r}" if unknown else f"{data}: no known task"
        raise SystemExit(f"{what}; known: {', '.join(known)}.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lr = lr if lr is not None else 1e-4 if full else 1e-3
    settings = Settings(
        base=base,
        base_name=base_name or base,
        full=full,
        rank=rank,
        targets=tuple(targets.split(",")),
        lr=lr,
        batch=batch,
        epochs=epochs,
        rows=rows,
        max_tokens=max_tokens,
        seed=seed,
        device=device,
    )
    try:
        for name in names:
            trainer = Trainer(name, data, out, settings)
            if score_only:
                trainer.measure(trainer.trained())
            elif (out / name / SCORE).is_file():
                say(f"{name}: is there")
            else:
                trainer.run()
    except TwinMergeError as problem:
        raise SystemExit(f"error: {problem}") from problem


if __name__ == "__main__":
    typer.run(main)
