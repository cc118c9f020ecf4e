"""Sphinx extension of this book: light pages without requests to other hosts, numbered figures, accessible markup.

Mathematics is set when the book is built, by MathJax (from the PyPI package sphinx-mathjax-offline) in the Node.js that
comes with Playwright. A page gets SVG paths and MathML, and loads neither a script nor fonts for them. Of the theme's
icons only those that are used stay, the search index is loaded by the search page alone, and files for developers of
the theme are removed. Launch buttons are omitted while _config.yml has no repository, because the theme cannot build
their links.
"""

import html
import itertools
import json
import re
import subprocess
from importlib.util import find_spec
from pathlib import Path

from docutils import nodes
from sphinx.ext.mathjax import html_visit_displaymath, html_visit_math

from permask_core.display.control import STYLE, framed

MATHJAX = Path(find_spec("sphinx-mathjax-offline").origin).parent / "static" / "mathjax"
NODE = Path(find_spec("playwright").origin).parent / "driver"
FORMULA = re.compile(r"\\\((?P<inline>.*?)\\\)|\\\[(?P<display>.*?)\\\]", flags=re.DOTALL)
MATHEMATICS = re.compile(r'(<(span|div) class="math notranslate nohighlight".*?</\2>)', flags=re.DOTALL)
ICON = re.compile(r'"?(?P<name>[a-z0-9-]+)"?:\[\d+,\d+,\[[^]]*\],"[0-9a-f]+",(?:"[^"]*"|\["[^]]*"\])\],?')
# Captions that permask_core.display writes, of figures and of tables.
CAPTION = re.compile(r'(<figure class="permask-(figure|results)">.*?<figcaption>)', flags=re.DOTALL)
KINDS = {"figure": "Figure", "results": "Table"}
# What the theme writes, and what a screen reader needs: a landmark around the sidebar, names that contain the visible
# text, and lists that have only items. Then what only adds weight.
MARKUP = [
    (r'<div id="pst-primary-sidebar"', r'\g<0> role="complementary" aria-label="Book"'),
    (r'(search-button-field[^>]*) aria-label="Search"', r"\1"),
    (r'(<summary) aria-label="Toggle hidden content"', r"\1"),
    (r'<summary>(?=<span class="toctree-toggle")', '<summary aria-label="Subpages">'),
    (r'(<i class="theme-switch[^>]*) title="[^"]*"', r"\1"),
    (r'<div role="list" class="citation-list">', '<div class="citation-list">'),
    (r'(<div class="citation"[^>]*) role="doc-biblioentry"', r"\1"),
    (r'<span class="pre">([^<]*)</span>', r"\1"),  # a tenth of the reference
    # Contents for print, without page numbers: another tenth.
    (r'(?s)<div>\s*<h2> Contents </h2>\s*</div>\s*<nav aria-label="Page">.*?</nav>', ""),
    (r"</li>\n<ul><li>", r"\n<ul><li>"),
    (r"</ul>(?=<li>|</ul>)", "</ul></li>"),
]
# What is not text in a page: code, drawings, what scripts write, and tags, whose attributes may contain a ">".
NO_TEXT = re.compile(r'''((?s:<(?P<element>pre|code|script|style|svg|title|output)\b.*?</(?P=element)>)'''
                     r'''|<(?:"[^"]*"|[^">])*>)''')
SEARCH = re.compile(r'\s*<script src="[^"]*(searchtools|language_data|searchindex)\.js[^"]*"></script>')


def launch_from_repository(app, config):
    """Switch launch and repository buttons on if _config.yml has an address, else off."""
    options = config.html_theme_options
    if options.get("repository_url"):
        options["use_repository_button"] = True
    else:
        options["launch_buttons"] = {}


def number_captions(app, env):
    """Number figures and tables through the book, those of the prose and those that notebooks draw."""
    env.permask_before, before = {}, dict.fromkeys(KINDS, 0)
    for docname in env.collect_relations():
        env.permask_before[docname], figures = dict(before), {}
        for node in env.get_doctree(docname).findall(lambda node: isinstance(node, nodes.figure | nodes.raw)):
            if isinstance(node, nodes.figure):
                before["figure"] += 1
                figures[node["ids"][0]] = (before["figure"],)
            else:
                for _, kind in CAPTION.findall(node.astext()):
                    before[kind] += 1
        env.toc_fignumbers.setdefault(docname, {})["figure"] = figures
    return []


def finish_figures(app, doctree, docname):
    """Write the numbers of captions in notebooks, and put figures of the prose in frames."""
    numbers = {kind: itertools.count(before + 1) for kind, before in app.env.permask_before[docname].items()}

    def number(caption):
        return f'{caption[0]}<span class="caption-number">{KINDS[caption[2]]} {next(numbers[caption[2]])} </span>'

    for node in list(doctree.findall(lambda node: isinstance(node, nodes.figure | nodes.raw))):
        if isinstance(node, nodes.figure):
            next(numbers["figure"])
        elif CAPTION.search(node.astext()):
            node.replace_self(nodes.raw("", CAPTION.sub(number, node.astext()), **node.attributes))
    for node in list(doctree.findall(lambda node: isinstance(node, nodes.image) and node["uri"].endswith(".svg"))):
        if isinstance(node.parent, nodes.figure):
            before, after = framed("\n", Path(app.srcdir, node["uri"]).read_text(encoding="utf8")).split("\n")
            node.replace_self([nodes.raw("", before, format="html"), node, nodes.raw("", after, format="html")])


def finish_pages(app, error):
    """Set the mathematics of all pages, correct the markup of the theme, and remove what no page loads."""
    if error is not None or app.builder.format != "html":
        return
    static = Path(app.outdir, "_static")
    for unused in (*static.rglob("*.map"), *static.glob("*macros.html")):
        unused.unlink()
    pages = {path: path.read_text(encoding="utf8") for path in Path(app.outdir).rglob("*.html")}
    icons = set(re.findall(r"fa-([a-z0-9-]+)", " ".join(pages.values())))
    script = static / "scripts" / "fontawesome.js"
    script.write_text(ICON.sub(lambda icon: icon[0] if icon["name"] in icons else "", script.read_text("utf8")), "utf8")
    found = {formula[0] for text in pages.values() for part, _ in MATHEMATICS.findall(text)
             for formula in FORMULA.finditer(part)}
    style, formulas = set_mathematics(sorted(found))
    (static / "mathematics.css").write_text(style, encoding="utf8")
    (static / "display.css").write_text(STYLE, encoding="utf8")
    for path, text in pages.items():
        text = MATHEMATICS.sub(lambda part: FORMULA.sub(lambda formula: formulas[formula[0]], part[0]), text)
        for pattern, better in MARKUP:
            text = re.sub(pattern, better, text)
        text = unbroken(text)
        path.write_text(text if path.name == "search.html" else SEARCH.sub("", text), encoding="utf8")


def unbroken(page):
    """Return a page with spaces that do not break in "95 %" and "n = 3", and that space in every percentage."""
    parts = NO_TEXT.split(page)
    parts[::3] = [re.sub(r"\bn = (?=\d)", "n\u00a0=\u00a0", re.sub(r"(?<=\d) ?%(?!\w)", "\u00a0%", text))
                  for text in parts[::3]]
    del parts[2::3]  # the names of elements
    return "".join(parts)


def set_mathematics(texts):
    """Return the style sheet of MathJax, and HTML by TeX in its delimiters."""
    tex = [(html.unescape(found["inline"] or found["display"]), found["display"] is not None)
           for found in map(FORMULA.fullmatch, texts)]
    done = subprocess.run([next(NODE.glob("node*")), Path(__file__).with_name("mathematics.js"), MATHJAX],
                          input=json.dumps(tex), capture_output=True, check=True, encoding="utf8")
    style, formulas = json.loads(done.stdout)
    return style, dict(zip(texts, formulas))


def skip_tuple_fields(app, what, name, obj, skip, options):
    """Skip the fields of a NamedTuple that have only Python's default docstring; the class describes them."""
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else None


def setup(app):
    """Register with Sphinx."""
    app.add_html_math_renderer("set", (html_visit_math, None), (html_visit_displaymath, None))
    app.config.html_math_renderer = "set"
    app.add_css_file("mathematics.css")
    app.add_css_file("display.css")
    app.add_js_file("permask.js", loading_method="defer")
    app.connect("config-inited", launch_from_repository, priority=100)
    app.connect("autodoc-skip-member", skip_tuple_fields)
    app.connect("env-get-updated", number_captions, priority=900)  # after the numbers of Sphinx
    app.connect("doctree-resolved", finish_figures)
    app.connect("build-finished", finish_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
