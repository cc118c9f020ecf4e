"""Sphinx extension of this book: no requests to other hosts, launch buttons only with an address, a clean API page.

Mathematics is typeset by the copy of MathJax in the PyPI package sphinx-mathjax-offline, which has 24 MB of MathJax
components. A page loads one script, whose glyphs are SVG paths (so there are no font files, which some browsers refuse
over file://), and sometimes a TeX extension. Only these are copied. Files for developers of the theme are removed.
Launch buttons are omitted while _config.yml has no repository, because the theme cannot build their links.
"""

from importlib.util import find_spec
from pathlib import Path
from shutil import copy2, copytree

MATHJAX = Path(find_spec("sphinx-mathjax-offline").origin).parent / "static" / "mathjax"


def launch_from_repository(app, config):
    """Switch launch and repository buttons on if _config.yml has an address, else off."""
    options = config.html_theme_options
    if options.get("repository_url"):
        options["use_repository_button"] = True
    else:
        options["launch_buttons"] = {}


def finish_static_files(app, error):
    """Copy the parts of MathJax that a page can load, and remove files that no page loads."""
    if error is not None or app.builder.format != "html":
        return
    static = Path(app.outdir, "_static")
    for unused in (*static.rglob("*.map"), *static.glob("*macros.html")):
        unused.unlink()
    extensions = Path("input", "tex", "extensions")
    copytree(MATHJAX / extensions, static / "mathjax" / extensions, dirs_exist_ok=True)
    copy2(MATHJAX / "tex-svg.js", static / "mathjax")


def skip_tuple_fields(app, what, name, obj, skip, options):
    """Skip the fields of a NamedTuple that have only Python's default docstring; the class describes them."""
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else None


def setup(app):
    """Register with Sphinx."""
    app.config.mathjax_path = "mathjax/tex-svg.js"
    app.connect("config-inited", launch_from_repository, priority=100)
    app.connect("autodoc-skip-member", skip_tuple_fields)
    app.connect("build-finished", finish_static_files)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
