"""Equations of the site as MathML, which browsers draw by themselves: a fence named math holds LaTeX, as on GitHub."""

from typing import Any

from latex2mathml.converter import convert


def fence(source: str, *_: Any, **__: Any) -> str:
    """Turn the LaTeX of a fence into MathML."""
    return f'<div class="math">{convert(source, display="block")}</div>'


def on_config(config: Any) -> Any:
    """Give fences named math to fence()."""
    fences = [{"name": "math", "class": "math", "format": fence}]
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": fences}
    return config
