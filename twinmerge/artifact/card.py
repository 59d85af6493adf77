"""The model card: a README.md that says what an artifact is made of and how to use it."""

from __future__ import annotations

import yaml

from .format import Manifest


def model_card(manifest: Manifest) -> str:
    """Markdown with the front matter that the Hugging Face hub reads."""
    front = {
        "base_model": manifest.base,
        "library_name": "twinmerge",
        "tags": ["merge", "twin-merging", "twinmerge"],
    }
    shared = sum(tensor.bytes for tensor in manifest.tensors)
    method = manifest.recipe.get("merge_method")
    rows = "\n".join(
        f"| {expert.name} | `{expert.reference}` | {'LoRA' if expert.adapter else 'full'} | "
        f"{expert.bytes:,} | {expert.bytes / shared:.2%} | {expert.drift:.4f} |"
        for expert in manifest.experts
    )
    warnings = "".join(f"- {warning}\n" for warning in manifest.warnings)
    router = "No router was fitted yet: `twinmerge fit-router THIS_FOLDER DATA`."
    if manifest.router is not None:
        fitted = manifest.router
        router = f"{fitted.said[0].upper()}{fitted.said[1:]}; {fitted.bytes:,} bytes."
        if fitted.held_out_accuracy is not None:
            router += (
                f" Fitted on {sum(fitted.rows.values()):,} rows; it chooses the right expert for "
                f"{fitted.held_out_accuracy:.1%} of {fitted.held_out_rows:,} rows held out from "
                f"its own data, with an expected calibration error of "
                f"{fitted.calibration_error or 0:.3f}."
            )
        if fitted.novelty is not None:
            router += (
                f" Inputs that are unlike all experts' data get less of the experts: "
                f"{1 - fitted.novelty.coverage:.1%} of the experts' own would."
            )
    return f"""---
{yaml.safe_dump(front, sort_keys=False)}---

# {len(manifest.experts)} experts of {manifest.base} in one folder

A shared expert (`{method}` of all experts, {shared:,} bytes, an ordinary `transformers` checkpoint)
and what each expert knows beyond it, in low-rank factors. A router reads every input and says how
much of each to add (Twin-Merging, [arXiv:2406.15479](https://arxiv.org/abs/2406.15479)).

```python
import twinmerge

model = twinmerge.load("THIS_FOLDER")
inputs = model.tokenizer(["some text"], return_tensors="pt", padding=True)
output = model(**inputs)      # logits, routing weights, and whose head answered, row by row
```

| expert | from | kind | bytes | of the shared expert | drift from the base |
| --- | --- | --- | --- | --- | --- |
{rows}

## Router

{router}

## Recipe

```yaml
{yaml.safe_dump(manifest.recipe, sort_keys=False)}```
{chr(10) + "## Warnings" + chr(10) + chr(10) + warnings if warnings else ""}"""
