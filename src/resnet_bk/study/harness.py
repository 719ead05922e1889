"""The model in lm-evaluation-harness, and the command ``resnet-bk-lm-eval``: ``lm_eval`` with ``--model resnet-bk``.

The harness finds a model of another package only after a program has registered it: the command does, and so does
``import resnet_bk.study.harness``.
"""

from typing import Any

from resnet_bk.extras import extra
from resnet_bk.folders import model_folder

with extra("eval"):
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM

from resnet_bk.hf import ResNetBKForCausalLM, load_tokenizer


@register_model("resnet-bk")
class HarnessModel(HFLM):
    """A model of a run. A document's first token is predicted from the end-of-document token, as in training."""

    def __init__(self, pretrained: str, max_length: int = 65_536, device: str | None = None, **others: Any):
        """Load a model.

        Args:
            pretrained: folder of a run or of a model.
            max_length: tokens that are read at once. The model has no longest length; longer documents are cut into
                windows of this length, each read without a past.
            device: default: the GPU if there is one.
            others: arguments of the harness's HFLM, such as batch_size.

        Raises:
            CheckpointError: the folder has no intact model.
        """
        import torch

        folder = str(model_folder(pretrained))
        super().__init__(
            pretrained=ResNetBKForCausalLM.from_pretrained(folder),
            tokenizer=load_tokenizer(folder),
            max_length=max_length,
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            **others,
        )


def main() -> None:
    """Run the command ``lm_eval``."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
