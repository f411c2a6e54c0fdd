"""Sphinx makes the site of these pages, without a network: `make docs`, then docs/_build/index.html."""

import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent), str(DOCS.parent / "experiments")]

import generated  # noqa: E402 - lies beside this file

project = "ogls"
copyright = "the authors of ogls"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_timeout = 900  # seconds a cell
nb_execution_raise_on_error = True
nb_merge_streams = True
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "ogls"
html_static_path = ["style.css"]
html_css_files = ["style.css"]
default_role = "py:obj"  # what docstrings have between single backticks: a link where there is such a name, else code
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}
suppress_warnings = ["myst.xref_missing"]  # of Markdown outside of this folder; a test follows every link


def setup(app) -> None:
    app.connect("builder-inited", lambda app: generated.write(Path(app.srcdir) / "_generated"))
    app.connect("autodoc-process-docstring", lambda app, what, name, of, options, lines: generated.formulas(lines))
