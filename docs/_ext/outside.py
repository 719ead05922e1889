"""Links from pages to files outside docs/, such as a page of measurements or an example.

Pages are read on GitHub too, so these links are relative. On the site they lead to the repository's page of the file,
if conf.py has a `repository`, else to a copy of the file.
"""

import os
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[2]


def outside(app: Sphinx, node: nodes.Element) -> Path | None:
    """Return the file outside docs/ that a node of MyST links to; None for other nodes."""
    target = node.get("reftarget")
    if isinstance(node, addnodes.download_reference):
        return Path(app.env.relfn2path(target)[1]).resolve()
    if isinstance(node, addnodes.pending_xref) and node.get("refdomain") == "doc":
        path = (Path(app.srcdir) / f"{target}.md").resolve()  # MyST takes any .md file for a page
        return path if path.is_file() and not path.is_relative_to(app.srcdir) else None
    return None


def mend(app: Sphinx, tree: nodes.document) -> None:
    """Replace the links of a page that lead out of docs/."""
    for node in list(tree.findall(nodes.Element)):
        if path := outside(app, node):
            if repository := app.config.repository:
                url = f"https://github.com/{repository}/blob/main/{path.relative_to(ROOT).as_posix()}"
                link: nodes.Element = nodes.reference("", "", *node.children, refuri=url, internal=False)
            else:
                name = Path(os.path.relpath(path, app.srcdir)).as_posix()
                link = addnodes.download_reference("", "", *node.children, reftarget=f"/{name}", refdomain=None)
            node.replace_self(link)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the value `repository` of conf.py, owner/name."""
    app.add_config_value("repository", "", "env", str)
    app.connect("doctree-read", mend, priority=100)  # before downloads are collected
    return {"parallel_read_safe": True, "version": "1"}
