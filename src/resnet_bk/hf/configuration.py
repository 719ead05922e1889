"""The model's configuration in transformers' form: the fields of ModelConfig and the special token ids."""

from dataclasses import fields
from typing import Any, ClassVar, Self

from transformers import PreTrainedConfig

from resnet_bk.config import ModelConfig, unknown_field

# Names of ModelConfig's fields here. Every generate() would take `top_k` for the setting of sampling.
_NAMES = {f.name: f.name for f in fields(ModelConfig)} | {"top_k": "num_experts_per_tok"}
# Fields of every configuration, and what transformers itself writes into a config.json or passes on.
_TRANSFORMERS_FIELDS = set(vars(PreTrainedConfig())) | {
    "model_type",
    "transformers_version",
    "auto_map",
    "name_or_path",
    "dtype",
    "torch_dtype",
    "architectures",
    "attn_implementation",
    "experts_implementation",
}


class ResNetBKConfig(PreTrainedConfig):
    """``config.json`` of a ResNet-BK model.

    The fields are those of :class:`resnet_bk.config.ModelConfig`, whose ``top_k`` is called ``num_experts_per_tok``
    here.

    Raises:
        ConfigError: an unknown field, or values that a model cannot have.
    """

    model_type = "resnet_bk"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "heads",
    }
    __eq__ = PreTrainedConfig.__eq__  # newer versions of transformers would compare only the fields of PreTrainedConfig

    def __init__(
        self,
        pad_token_id: int | None = 0,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = 1,
        use_cache: bool = True,
        **others: Any,
    ):
        others = {self.attribute_map.get(name, name): value for name, value in others.items()}
        shape = {name: others.pop(here) for name, here in _NAMES.items() if here in others}
        for name in others:
            if not name.startswith("_") and name not in _TRANSFORMERS_FIELDS:
                raise unknown_field(name, list(_NAMES.values()), "config.json")
        self.use_cache = use_cache
        config = ModelConfig.from_dict(shape)
        special = {"pad_token_id": pad_token_id, "bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
        super().__init__(**special, **others)  # type: ignore[arg-type]
        for name, value in config.to_dict().items():
            setattr(self, _NAMES[name], value)
        self.n_layers = config.blocks

    @classmethod
    def from_model_config(cls, config: ModelConfig, **others: Any) -> Self:
        """others: fields that ModelConfig does not have, such as pad_token_id."""
        return cls(**{_NAMES[name]: value for name, value in config.to_dict().items()}, **others)

    def model_config(self) -> ModelConfig:
        return ModelConfig.from_dict({name: getattr(self, here) for name, here in _NAMES.items()})

    @property
    def heads(self) -> int:
        return self.model_config().heads
