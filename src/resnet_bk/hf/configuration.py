"""The model's configuration in transformers' form: the fields of ModelConfig and the special token ids."""

from pathlib import Path
from typing import Any, ClassVar, Self

from transformers import PreTrainedConfig

from resnet_bk.config import ConfigError, ModelConfig, check_integer, shown, unknown_field
from resnet_bk.config.saved import NAMES, read_json

# A file beside each config.json. transformers runs it in programs that do not import this package, if they allow it.
_MODELING_MODULE = "modeling_resnet_bk"
_MODELING = '''"""Classes for ``from_pretrained(..., trust_remote_code=True)``, from the installed package resnet-bk."""

try:
    from resnet_bk.hf import ResNetBKConfig, ResNetBKForCausalLM
except ImportError as error:
    raise ImportError(f"this model needs the package resnet-bk ({error}); run: pip install 'resnet-bk[hf]'") from error

__all__ = ["ResNetBKConfig", "ResNetBKForCausalLM"]
'''
# Fields of every configuration, and what transformers itself writes into a config.json or passes on.
_TRANSFORMERS_FIELDS = {
    *vars(PreTrainedConfig()),
    *PreTrainedConfig().to_dict(),
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

    The fields are those of :class:`resnet_bk.ModelConfig`, whose ``top_k`` is called ``num_experts_per_tok``
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
    # Trainer's predictions are the logits alone.
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "past_key_values", "aux_loss"]
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
        shape = {name: others.pop(here) for name, here in NAMES.items() if here in others}
        for name in others:
            if not name.startswith("_") and name not in _TRANSFORMERS_FIELDS:
                raise unknown_field(name, list(NAMES.values()), "model")
        if (kind := others.get("model_type", self.model_type)) != self.model_type:
            raise ConfigError(
                f"model_type: got {shown(kind)}, allowed {self.model_type!r}; the model is of another kind"
            )
        if type(use_cache) is not bool:
            raise ConfigError(f"use_cache: got {shown(use_cache)}, allowed true or false")
        self.use_cache = use_cache
        if shape.get("causal") is False:
            raise ConfigError("model.causal: got False, allowed True; use LanguageModel for a bidirectional model")
        config = ModelConfig.from_dict(shape)
        special = {"pad_token_id": pad_token_id, "bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
        _check_special(special, config.vocab_size)
        super().__init__(**special, **others)  # type: ignore[arg-type]
        # Not those of a config.json from a hub, which transformers has prefixed with the name of the repository.
        self.auto_map = {
            "AutoConfig": f"{_MODELING_MODULE}.ResNetBKConfig",
            "AutoModelForCausalLM": f"{_MODELING_MODULE}.ResNetBKForCausalLM",
        }
        for name, value in config.to_dict().items():
            setattr(self, NAMES[name], value)
        self.n_layers, self.energy = config.blocks, config.energy_kind

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Load a configuration as transformers does.

        Raises:
            ConfigError: config.json is not a mapping in JSON, or has values that a model cannot have.
        """
        path = str(pretrained_model_name_or_path)
        name = str(Path(path, kwargs.get("subfolder") or ""))
        return super().from_pretrained(path, **{"name_or_path": name, **kwargs})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a configuration as transformers does. Its Auto classes call this with the fields of a config.json.

        Raises:
            ConfigError: values that a model cannot have.
        """
        file = _file(str(kwargs.get("name_or_path") or ""))
        try:
            return super().from_dict(config_dict, **kwargs)
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from error
        except Exception as error:  # transformers checks its own fields in many ways
            reason = str(error).partition("\n")[0]
            raise ConfigError(f"{file}: cannot be used by transformers ({type(error).__name__}: {reason})") from error

    @classmethod
    def _dict_from_json_file(cls, json_file: Any) -> dict[str, Any]:
        """Return the fields in a config.json. transformers calls it, and cannot explain all that may go wrong."""
        return read_json(Path(json_file))

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save the configuration as transformers does, and beside it the file by which it loads without an import."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        (Path(save_directory) / f"{_MODELING_MODULE}.py").write_text(_MODELING, "utf-8")
        super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def register_for_auto_class(cls, *args: Any, **kwargs: Any) -> None:
        """Do nothing: transformers would copy this file instead of the one that `save_pretrained` writes."""

    @classmethod
    def from_model_config(cls, config: ModelConfig, **others: Any) -> Self:
        """others: fields that ModelConfig does not have, such as pad_token_id."""
        return cls(**{NAMES[name]: value for name, value in config.to_dict().items()}, **others)

    def model_config(self) -> ModelConfig:
        return ModelConfig.from_dict({name: getattr(self, here) for name, here in NAMES.items()})

    @property
    def heads(self) -> int:
        return self.model_config().heads


def _file(name: str) -> str:
    """Return the name of the configuration of a folder, in messages."""
    if not name:
        return "configuration"
    return name if Path(name).is_file() else str(Path(name, "config.json"))


def _check_special(special: dict[str, Any], vocab_size: int) -> None:
    """Raise ConfigError unless each special token is None or in the vocabulary; there may be several ends of a text."""
    for name, value in special.items():
        several = name == "eos_token_id" and isinstance(value, list)
        for one in value if several else [value]:
            if one is not None:
                check_integer("model", 0, vocab_size - 1, **{name: one})
