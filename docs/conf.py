"""The site: `make docs` builds out/site of docs/, README.md and CONTRIBUTING.md as they are, and any warning fails."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# Pages in the order of the sidebar, from docs/; a star takes what it fits.
NAV = {
    "Begin": ["choose", "recipes", "recipe", "data", "troubleshooting", "glossary"],
    "Train": ["launching", "clusters", "runs", "reliability", "four-bit-base", "security"],
    "Split": ["tensor-parallel", "context-parallel"],
    "Measure": ["doctor", "verify", "plan", "scaling", "bench", "energy", "timeline"],
    "Strategies": ["strategies/plain", "strategies/*", "compatibility", "other-loops", "adding-a-strategy", "families"],
    "Results": ["results/index", "results/*"],
    "Ebbtide": ["../README", "../CONTRIBUTING", "../CHANGELOG"],
}

project = "Ebbtide"
version = release = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
html_title = f"{project} {version}"
root_doc = "docs/index"
extensions = ["myst_parser"]
include_patterns = ["docs/**", "*.md"]
# Folders that are not looked into; files that pages link to are found all the same.
exclude_patterns = [path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "docs"]
myst_heading_anchors = 4
nitpicky = True
highlight_language = "none"
html_theme = "furo"
html_static_path = html_css_files = ["site.css"]
html_copy_source = html_show_copyright = html_show_sphinx = False


def add_nav(app: Any, page: str, source: list[str]) -> None:
    """The sidebar is no text of a page, so that pages read the same where this is not run."""
    if page == root_doc:
        for caption, pages in NAV.items():
            source[0] += f"\n```{{toctree}}\n:hidden:\n:glob:\n:caption: {caption}\n\n" + "\n".join(pages) + "\n```\n"


def lead_to_first_page(app: Any, error: Exception | None) -> None:
    to = f"{root_doc}.html"
    page = f'<!DOCTYPE html><meta http-equiv="refresh" content="0; url={to}"><a href="{to}">{project}</a>\n'
    (Path(app.outdir) / "index.html").write_text(page)


def setup(app: Any) -> None:
    app.connect("source-read", add_nav)
    app.connect("build-finished", lead_to_first_page)
