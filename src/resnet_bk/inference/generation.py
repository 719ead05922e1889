"""The command ``resnet-bk generate``: continue a prompt."""

import torch

from resnet_bk.config import ConfigError, GenerateConfig, check_text, read_text, shown
from resnet_bk.hf import ResNetBKForCausalLM, Tokenizer, quiet_transformers
from resnet_bk.inference.loading import load
from resnet_bk.inference.speculation import speculate
from resnet_bk.report.terminal import Console, show

_LONGEST_PROMPT = 1 << 24  # bytes


def generate_text(model: ResNetBKForCausalLM, tokenizer: Tokenizer, prompt: str, config: GenerateConfig) -> str:
    """Return the prompt and its continuation.

    Raises:
        ConfigError: the prompt has no token, or config.speculate is set and the model has no early exit.
    """
    encoded = tokenizer(prompt, return_tensors="pt").to(model.device)
    if encoded["input_ids"].numel() == 0:
        raise ConfigError(f"generate.prompt: got {shown(prompt)}, which has no token; give another text")
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
    text = generate_text(model, tokenizer, _read_prompt(config), config)
    show(console, text)
    return text


def _read_prompt(config: GenerateConfig) -> str:
    """Return the prompt, which may come from standard input."""
    if config.prompt != "-":
        return config.prompt
    prompt = read_text("generate.prompt", "-", _LONGEST_PROMPT + 4)  # a character may be cut
    if len(prompt.encode()) > _LONGEST_PROMPT:
        raise ConfigError(f"generate.prompt: got more than {_LONGEST_PROMPT} bytes, allowed at most that; give less")
    check_text("generate", prompt=prompt)
    return prompt
