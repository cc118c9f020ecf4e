"""Sphinx extension of this book: no request to other hosts, launch buttons only with an address, a clean API page.

Mathematics is typeset by the copy of MathJax in the PyPI package sphinx-mathjax-offline. That package is 24 MB of every
MathJax component; a page loads one script, whose glyphs are SVG paths inside it (so no font files, which some browsers
refuse over file://), and now and then a TeX extension. Only those are copied. What the theme brings for its own
developers is removed. Launch buttons are left out while _config.yml names no repository, because the theme cannot build
their links then.
"""

from importlib.util import find_spec
from pathlib import Path
from shutil import copy2, copytree

MATHJAX = Path(find_spec("sphinx-mathjax-offline").origin).parent / "static" / "mathjax"


def launch_from_repository(app, config):
    """Switch launch and repository buttons on or off, as the one address in _config.yml says."""
    options = config.html_theme_options
    if options.get("repository_url"):
        options["use_repository_button"] = True
    else:
        options["launch_buttons"] = {}


def finish_static_files(app, error):
    """Copy the parts of MathJax that a page can ask for, and remove what no page asks for."""
    if error is not None or app.builder.format != "html":
        return
    static = Path(app.outdir, "_static")
    for unused in (*static.rglob("*.map"), *static.glob("*macros.html")):
        unused.unlink()
    extensions = Path("input", "tex", "extensions")
    copytree(MATHJAX / extensions, static / "mathjax" / extensions, dirs_exist_ok=True)
    copy2(MATHJAX / "tex-svg.js", static / "mathjax")


def skip_tuple_fields(app, what, name, obj, skip, options):
    """Leave out the fields of a NamedTuple that have no docstring but Python's own; the class describes them."""
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else None


def setup(app):
    """Register with Sphinx."""
    app.config.mathjax_path = "mathjax/tex-svg.js"
    app.connect("config-inited", launch_from_repository, priority=100)
    app.connect("autodoc-skip-member", skip_tuple_fields)
    app.connect("build-finished", finish_static_files)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
