"""Sphinx: the pages of this directory, the notebook of examples/ (executed), and an API reference from the docstrings.

make docs      # into build/docs; a warning is an error
"""

import inspect
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The kernel that executes the notebook imports the package from the checkout.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])

# Sphinx reads pages of this directory alone. A copy that is older than the notebook is replaced, an equal one kept.
NOTEBOOK, COPY = ROOT / "examples" / "quickstart.py", ROOT / "docs" / "notebook.py"
if not COPY.exists() or COPY.read_text() != NOTEBOOK.read_text():
    COPY.write_text(NOTEBOOK.read_text())

project, author, copyright = "gdsd_jax", "the gdsd_jax authors", "Apache-2.0"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["conf.py", "make_configuration.py"]
html_theme, html_title = "sphinx_book_theme", "gdsd_jax"
html_theme_options = {"show_toc_level": 2, "home_page_in_toc": True, "navbar_persistent": []}
html_static_path, html_css_files = ["static"], ["tables.css"]

nb_custom_formats = {".py": ["jupytext.reads", {"fmt": "py:percent"}]}
nb_execution_mode, nb_execution_timeout, nb_execution_raise_on_error = "force", 600, True
# A progress line on each update is noise on a page.
nb_merge_streams = True
myst_enable_extensions, myst_heading_anchors = ["dollarmath", "amsmath"], 3

autodoc_member_order, autodoc_typehints_format = "bysource", "short"
napoleon_numpy_docstring, napoleon_use_ivar = False, True

SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Yields|Example|Examples|Note):$")


def rst(app, what, name, obj, options, lines):
    """Turns a docstring's plain text into the reStructuredText that Sphinx reads.

    Code is written between single backticks and formulas are indented, as in Markdown; fields may be listed as
    `name: text` without a heading.
    """
    fields = set()
    if inspect.isclass(obj):
        fields = {field for base in obj.__mro__ for field in base.__dict__.get("__annotations__", {})}
    out, literal, listing, section = [], False, False, False
    returned = False
    for line in lines:
        text, indent = line.strip(), len(line) - len(line.lstrip())
        section = section or bool(SECTION.match(text))
        # The text before a colon is otherwise taken for the type of what is returned.
        if returned and re.match(r"[^`:]* [^`:]*: ", text):
            line = line.replace(": ", ", ", 1)
        returned = text in ("Returns:", "Yields:")
        if section or listing:  # of several names before a colon, Sphinx would take the first for a type
            line = re.sub(r"^(\s*)(\w+(?:, \w+)+): ", lambda m: f"{m[1]}{m[2].replace(', ', '/')}: ", line)
        names = {part.strip() for part in text.partition(":")[0].split(",")}
        if fields and not section and not listing and ":" in text and names <= fields:
            out += ["", "Attributes:"]
            listing = True
        if listing and text and indent == 0 and not names <= fields and ":" not in text:
            listing = False
            out.append("")
        if not section and not listing and indent and not literal and out and not out[-1].strip():
            out += ["::", ""]
            literal = True
        elif literal and text and not indent:
            literal = False
        if listing and indent > 4:
            line = "    " + text
        out.append(line if literal else ("  " if listing else "") + escaped(line))
    lines[:] = out


def escaped(line: str) -> str:
    """Marks code as reStructuredText does, and takes their meaning from the stars, bars and underscores around it."""
    parts = re.split(r"(`[^`]*`)", line.replace("``", "`"))
    plain = [re.sub(r"(?<=\w)_(?!\w)|[*|]", lambda m: "\\" + m[0], part) for part in parts]
    return "".join(f"`{part}`" if part.startswith("`") and len(part) > 2 else plain[i] for i, part in enumerate(parts))


def inside(app, docname, source):
    """Lets links out of this directory, which work in a checkout, work on the site: to the notebook, or as names."""
    source[0] = source[0].replace("](../examples/quickstart.py)", "](notebook.py)")
    if docname == "index":  # no page is left out, whoever adds one
        rest = sorted(app.env.found_docs - set(source[0].split()) - {"index"})
        lines = ["```{toctree}", ":maxdepth: 1", ":caption: Further", *rest, "```", ""]
        source[0] += "\n".join(["", *lines]) if rest else ""
    source[0] = re.sub(r"\[([^\]]+)\]\(\.\./([^)]+)\)", named, source[0])


def named(link: re.Match) -> str:
    """Replaces a link to a file outside of the site by its text and the file's path, or by the path alone."""
    text, path = link[1], link[2]
    return f"`{path}`" if text.strip("`") in (path, Path(path).name) else f"{text} (`{path}`)"


def setup(app):
    app.connect("source-read", inside)
    app.connect("autodoc-process-docstring", rst, priority=400)
