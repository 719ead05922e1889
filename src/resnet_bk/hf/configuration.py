"""The model's configuration in transformers' form: the fields of ModelConfig beside the special token ids."""

from dataclasses import asdict, field, fields
from typing import Any, ClassVar, Self

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from resnet_bk.config import (
    DepthConfig,
    ExpertsConfig,
    LengthConfig,
    ModelConfig,
    MultiScaleConfig,
    SparsityConfig,
    unknown_field,
)

# Names of ModelConfig's fields here. `top_k` would be taken for sampling's top_k by every generate().
_NAMES = {f.name: f.name for f in fields(ModelConfig)} | {"top_k": "num_experts_per_tok"}
# What transformers itself writes into a config.json, or passes on, beside declared fields.
_TRANSFORMERS_FIELDS = {
    "model_type",
    "transformers_version",
    "auto_map",
    "name_or_path",
    "dtype",
    "torch_dtype",
    "architectures",
}


@strict
class ResNetBKConfig(PreTrainedConfig):
    """``config.json`` of a ResNet-BK model. Fields and defaults: :class:`resnet_bk.config.ModelConfig`, whose
    ``top_k`` is ``num_experts_per_tok`` here."""

    model_type = "resnet_bk"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "heads",
    }

    vocab_size: int = 259
    d_model: int = 64
    n_layers: int | None = None
    n_seq: int = 128
    num_experts: int = 4
    num_experts_per_tok: int = 1
    readout: str = "propagator"
    energy: str = "real"
    n_heads: int | None = None
    conv_width: int = 4
    d_ff: int | None = None
    tie_word_embeddings: bool = True
    causal: bool = True
    balance_weight: float = 0.01
    multiscale: dict = field(default_factory=lambda: asdict(MultiScaleConfig()))
    length: dict = field(default_factory=lambda: asdict(LengthConfig()))
    depth: dict = field(default_factory=lambda: asdict(DepthConfig()))
    sparsity: dict = field(default_factory=lambda: asdict(SparsityConfig()))
    experts: dict = field(default_factory=lambda: asdict(ExpertsConfig()))
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 1
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        for name in kwargs:
            if not name.startswith("_") and name not in _TRANSFORMERS_FIELDS and name not in self.attribute_map:
                raise unknown_field(name, list(type(self).__annotations__), "config.json")
        super().__post_init__(**kwargs)
        self.n_layers = self.model_config().blocks  # raises on values that no model can have

    @classmethod
    def from_model_config(cls, config: ModelConfig, **others: Any) -> Self:
        """others: fields that ModelConfig does not have, such as pad_token_id."""
        return cls(**{_NAMES[name]: value for name, value in config.to_dict().items()}, **others)

    def model_config(self) -> ModelConfig:
        return ModelConfig.from_dict({name: getattr(self, here) for name, here in _NAMES.items()})

    @property
    def heads(self) -> int:
        return self.model_config().heads
