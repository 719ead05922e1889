"""Classes for ``from_pretrained(..., trust_remote_code=True)``, from the installed package resnet-bk."""

try:
    from resnet_bk.hf import ResNetBKConfig, ResNetBKForCausalLM
except ImportError as error:
    raise ImportError(f"this model needs the package resnet-bk ({error}); run: pip install 'resnet-bk[hf]'") from error

__all__ = ["ResNetBKConfig", "ResNetBKForCausalLM"]
