"""Load trained models."""

from resnet_bk.adaptive.depth import AdaptiveDepth
from resnet_bk.checkpoint import CheckpointError
from resnet_bk.config import ConfigError
from resnet_bk.folders import model_folder
from resnet_bk.hf import ResNetBKForCausalLM, Tokenizer, load_tokenizer, on_device


def load(path: str, threshold: float | None = None) -> tuple[ResNetBKForCausalLM, Tokenizer]:
    """Return a trained model, in evaluation mode and on the GPU if there is one, and its tokenizer.

    Args:
        path: folder of a run or of a model.
        threshold: replaces the threshold of adaptive depth that the model was trained with.

    Raises:
        CheckpointError: the folder has no intact model.
        ConfigError: a threshold is given, but the model has no adaptive depth; or the settings are not valid.
    """
    folder = model_folder(path)
    try:
        model = ResNetBKForCausalLM.from_pretrained(folder)
    except (CheckpointError, ConfigError):
        raise
    except Exception as error:  # transformers and safetensors raise many classes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{folder}: cannot be loaded as a ResNet-BK model ({reason})") from error
    if threshold is not None:
        layers = [module for module in model.modules() if isinstance(module, AdaptiveDepth)]
        if not layers:
            raise ConfigError(f"depth_threshold: got {threshold}, but {folder} has no adaptive depth; leave it out")
        for layer in layers:
            layer.threshold = threshold
    return on_device(model).eval(), load_tokenizer(str(folder))
