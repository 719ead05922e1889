"""Sphinx's configuration of the documentation site. `make docs` builds it into docs/_build/html."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "_ext"))

import resnet_bk

project = "ResNet-BK"
author = "The ResNet-BK contributors"
copyright = f"{author}, Apache-2.0"  # Sphinx reads this name
version = release = resnet_bk.__version__
# owner/name of the repository, which GitHub's workflows set; without it, links to the sources are downloads.
repository = os.environ.get("GITHUB_REPOSITORY", "")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "settings",
    "outside",
]
exclude_patterns = ["_build", "_ext"]
nitpicky = True
default_role = "code"  # docstrings write `name`
smartquotes = False  # quoted values are there to be typed
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
napoleon_use_ivar = True
# Types of other packages, and names of this package that are not on the site.
nitpick_ignore_regex = [
    (r"py:.*", r"(collections|numpy|pathlib|torch|transformers|typing)\..*"),
    (r"py:(class|func|mod)", r"resnet_bk\.(adaptive|config|engine|layers|ops|training)\.[\w.]*"),
]

html_theme = "furo"
html_title = f"ResNet-BK {release}"
html_copy_source = False
html_theme_options = (
    {}
    if not repository
    else {
        "source_repository": f"https://github.com/{repository}/",
        "source_branch": "main",
        "source_directory": "docs/",
    }
)
linkcheck_anchors = False
