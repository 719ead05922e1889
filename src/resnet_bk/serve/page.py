"""The page at ``/``: a text that arrives in colors, without anything from elsewhere."""

import base64
import functools
import hashlib
import json
import re
from pathlib import Path

from resnet_bk.report.html import STYLE

_TEMPLATE = Path(__file__).with_name("page.html")


@functools.cache
def _template() -> str:
    return _TEMPLATE.read_text(encoding="utf-8").replace("STYLE", STYLE, 1)


def page(name: str, blocks: int, threshold: float | None, most_tokens: int) -> str:
    """Return the page.

    Args:
        name: of the model.
        blocks: of the model.
        threshold: of adaptive depth; None without it.
        most_tokens: that a request may ask for.
    """
    model = {"name": name, "blocks": blocks, "threshold": threshold, "mostTokens": most_tokens}
    data = json.dumps(model).replace("<", "\\u003c")  # nothing in it ends the element
    return _template().replace("MODEL", data, 1)


@functools.cache
def headers() -> dict[str, str]:
    """Return the headers of the page: it runs its own script and style only, and talks to this server only."""
    sources = {}
    for element in ("script", "style"):
        content = re.search(rf"<{element}>(.*?)</{element}>", _template(), re.DOTALL)
        assert content is not None
        sources[element] = base64.b64encode(hashlib.sha256(content[1].encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{sources['script']}'; style-src 'sha256-{sources['style']}'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
