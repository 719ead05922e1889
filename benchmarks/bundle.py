"""Put a finished run into the package as a bundled model, in bfloat16: ``python benchmarks/bundle.py RUN NAME``.

``configs/NAME.yaml`` is the recipe of the run. The bundled model is a run folder without checkpoints.
"""

import shutil
import sys
from pathlib import Path

import torch

import resnet_bk
from resnet_bk.config import EvalConfig
from resnet_bk.folders import CONFIG, METRICS, MODEL, RESULTS
from resnet_bk.hf import ResNetBKForCausalLM
from resnet_bk.report.tables import Console
from resnet_bk.study.card import CARD
from resnet_bk.study.evaluation import evaluate_checkpoint

LARGEST = 4_000_000  # bytes of the files of a bundled model
MODELS = Path(resnet_bk.__file__).parent / "models"
NOTE = """
## Weights

They are rounded to bfloat16 and have {bits:.4f} bits per byte on the held-out text; the table is of those before. Its
speeds are those of a machine that other programs kept busy.

## Text, licence, limits

The text is the source of Python's standard library, which is under the licence of the Python Software Foundation. The
model is a demonstration of this package, under Apache-2.0: it writes what looks like Python, and code that runs only by
chance. It has not been trained on instructions, and may repeat passages of its text.
"""


def bundle(run: Path, target: Path) -> int:
    """Write the model, the settings and the results of a run to a folder, and return the bytes of its files."""
    shutil.rmtree(target, ignore_errors=True)
    model = ResNetBKForCausalLM.from_pretrained(run / MODEL, dtype=torch.bfloat16)
    model.save_pretrained(target / MODEL)
    for path in (run / CONFIG, run / RESULTS, *(run / MODEL).iterdir()):
        copy = target / path.relative_to(run)
        if not copy.exists():
            shutil.copyfile(path, copy)
    settings = (target / CONFIG).read_text().replace(f"output_dir: {run}\n", f"output_dir: runs/{target.name}\n")
    (target / CONFIG).write_text(settings)
    lines = (run / METRICS).read_text().splitlines(keepends=True)
    (target / METRICS).write_text("".join(lines[:: 1 + len(lines) // 200]))
    scores = evaluate_checkpoint(EvalConfig(str(target)), Console())
    with (target / MODEL / CARD).open("a", encoding="utf-8") as card:
        card.write(NOTE.format(bits=scores["bits_per_byte"]))
    files = [path for path in target.rglob("*") if path.is_file()]
    for path in files:
        path.chmod(0o644)  # safetensors writes files for their owner only
    return sum(path.stat().st_size for path in files)


if __name__ == "__main__":
    size = bundle(Path(sys.argv[1]), MODELS / sys.argv[2])
    print(f"{size:,} bytes")
    if size > LARGEST:
        sys.exit(f"more than the {LARGEST:,} allowed")
