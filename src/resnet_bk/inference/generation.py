"""The command ``resnet-bk generate``: continue a prompt."""

import sys

import torch

from resnet_bk.config import ConfigError, GenerateConfig, check_text
from resnet_bk.extras import extra
from resnet_bk.hf import ResNetBKForCausalLM, Tokenizer, quiet_transformers
from resnet_bk.inference.loading import load
from resnet_bk.inference.speculation import speculate

with extra("train"):
    from rich.console import Console


def generate_text(model: ResNetBKForCausalLM, tokenizer: Tokenizer, prompt: str, config: GenerateConfig) -> str:
    """Return the prompt and its continuation.

    Raises:
        ConfigError: the prompt is empty, or config.speculate is set and the model has no early exit.
    """
    if not prompt:
        raise ConfigError("generate.prompt: is empty; give at least one character")
    encoded = tokenizer(prompt, return_tensors="pt").to(model.device)
    if config.speculate:
        try:
            drafts = speculate(model.model, encoded["input_ids"], config.max_new_tokens, config.speculate)
        except ValueError as error:
            raise ConfigError(f"generate.speculate: {error}") from error
        ids = torch.cat([encoded["input_ids"], drafts.tokens], dim=1)[0].tolist()
        end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
        return str(tokenizer.decode(ids[:end], skip_special_tokens=True))
    torch.manual_seed(config.seed)
    sampling = {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p, "top_k": 0}
    output = model.generate(
        **encoded, max_new_tokens=config.max_new_tokens, **(sampling if config.temperature else {"do_sample": False})
    )
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def generate(config: GenerateConfig, console: Console) -> str:
    """Run the command: continue a prompt, print and return prompt and continuation."""
    quiet_transformers()
    model, tokenizer = load(config.checkpoint, config.depth_threshold)
    prompt = sys.stdin.read() if config.prompt == "-" else config.prompt
    check_text("generate", prompt=prompt)
    text = generate_text(model, tokenizer, prompt, config)
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    return text
