"""The settings of the text."""

from dataclasses import dataclass
from typing import Literal

from resnet_bk.config.checks import ConfigError, check_choices, check_range, check_text, shown


@dataclass(frozen=True)
class DataConfig:
    """The text to train on and its tokenizer."""

    source: str = "stdlib"
    """Training text: 'stdlib' (Python's standard library), a file, a folder, or a hub dataset 'owner/name[:config]'."""
    sources: dict[str, float] | None = None
    """Several training texts instead of source, with their weights: {stdlib: 0.7, docs: 0.3}. A weight, divided by the
    sum of all weights, is the share of the training windows that come from the source, and so of the training tokens,
    whatever its size: a small source with a large weight is repeated. An epoch has as many windows as all sources
    together. Text is held out from each source as if it were the only one, and counts by its size, not by weights."""
    rows: Literal["documents", "lines"] = "documents"
    """Rows of a hub dataset. 'documents': each is a document; empty ones are left out. 'lines': they are the lines of
    one document, joined by line ends, for datasets that have the lines of articles as rows, such as WikiText. Not used
    with files."""
    val_source: str | None = None
    """Held-out text: 'stdlib', a file or a folder. Default: for a hub dataset its validation split; else a part of the
    source, see val_fraction."""
    val_fraction: float = 0.05
    """Share of the source to hold out: of several files every k-th in sorted order, k = 1 / val_fraction rounded; of a
    single file its end. Not used with val_source or a hub dataset."""
    include: tuple[str, ...] = ()
    """Patterns of files to read, such as ["*.py", "docs"]; others are left out. `*` stands for any characters, `?` for
    one. A pattern is compared with the path below the source, with the file's name, and with those of each folder on
    the way, so "docs" takes all of docs. Applies to source, sources and val_source, not to hub datasets. Empty: all
    files."""
    exclude: tuple[str, ...] = ()
    """Patterns of files to leave out, as in include; they win over it. Hidden files are always left out."""
    tokenizer: str = "byte"
    """'byte', a folder with a Hugging Face tokenizer, or the name of one on the hub."""
    cache: str | None = None
    """Folder for token files. Default: $XDG_CACHE_HOME/resnet-bk if that variable is set, else ~/.cache/resnet-bk."""

    def __post_init__(self) -> None:
        check_choices("data", self)
        check_range("data", 1e-6, 0.5, val_fraction=self.val_fraction)
        check_text("data", source=self.source, tokenizer=self.tokenizer)
        for name in ("val_source", "cache"):
            if getattr(self, name) is not None:
                check_text("data", **{name: getattr(self, name)})
        for name in ("include", "exclude"):
            patterns = getattr(self, name)
            if not isinstance(patterns, list | tuple):
                raise ConfigError(f"data.{name}: got {shown(patterns)}, allowed a list of patterns such as ['*.py']")
            check_text("data", **{f"{name}[{i}]": pattern for i, pattern in enumerate(patterns)})
            object.__setattr__(self, name, tuple(patterns))
        if self.sources is not None:
            self._check_sources(self.sources)

    def _check_sources(self, sources: dict[str, float]) -> None:
        if not isinstance(sources, dict) or not sources:
            raise ConfigError(
                f"data.sources: got {shown(sources)}, allowed sources with weights, such as {{stdlib: 0.7, docs: 0.3}}"
            )
        if self.source != "stdlib":
            raise ConfigError(
                f"data.sources: got {shown(sources)} with data.source = {shown(self.source)}, allowed one of the two; "
                "leave source out, or set sources to null"
            )
        for source, weight in sources.items():
            check_text("data", **{f"sources[{shown(source)}]": source})
            check_range("data", 1e-6, 1e6, **{f"sources[{shown(source)}]": weight})

    @property
    def shares(self) -> dict[str, float]:
        """Map each source to its share of the training windows."""
        if self.sources is None:
            return {self.source: 1.0}
        return {source: weight / sum(self.sources.values()) for source, weight in self.sources.items()}

    @property
    def setting(self) -> str:
        """Name of the setting that names the training text, for messages."""
        return "data.source" if self.sources is None else "data.sources"
