"""The model card, a README.md beside the weights, from the results of a run."""

from collections.abc import Sequence
from pathlib import Path

from resnet_bk.config import TrainConfig
from resnet_bk.study.versions import version_lines

CARD = "README.md"


def model_card(name: str, config: TrainConfig, rows: Sequence[tuple[str, str]]) -> str:
    """Return the card as Markdown with the header that the Hugging Face hub reads.

    Args:
        name: of the model.
        config: settings of the run.
        rows: name and value of each result.
    """
    model = config.model
    techniques = ", ".join(model.techniques) or "none"
    sources = ", ".join(f"`{_public(source)}`" for source in config.data.shares)
    table = "\n".join(f"| {row} | {value} |" for row, value in rows)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- resnet-bk
---

# {name}

A causal language model on the BK core, {model.d_model} wide, {model.blocks} blocks; adaptive techniques: {techniques}.
Trained by `resnet-bk train` on {sources}, in windows of {model.n_seq} tokens, with the tokenizer
`{_public(config.data.tokenizer)}`.

| | |
|---|---|
{table}

## Use

The model needs the package `resnet-bk`: `pip install 'resnet-bk[hf]'`. The file `modeling_resnet_bk.py` beside the
weights only imports it; after `import resnet_bk`, `trust_remote_code` is not needed.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "{name}"  # this folder, or its name on the hub
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(path)
batch = tokenizer(["def "], return_tensors="pt")
print(tokenizer.batch_decode(model.generate(**batch, max_new_tokens=60)))
```

{" ".join(version_lines())}
"""


def _public(name: str) -> str:
    """Return a name of the hub as it is, and of a path on this machine its last part."""
    path = Path(name)
    return path.resolve().name if path.is_absolute() or path.exists() else name
