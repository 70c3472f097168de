"""Settings of the site: ``sphinx-build -W docs docs/_build/html``, or ``nox -s docs``.

Needs requirements/docs.txt, and what mmela itself needs, as the reference is
read from the docstrings of what is imported.
"""

import os
import re
import sys
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))
os.environ.setdefault('OMP_NUM_THREADS', '1')

from mmela import __version__  # noqa: E402

project = 'mmela'
author = 'The mmela authors'
project_copyright = author
version = release = __version__

extensions = [
    'myst_nb',
    'sphinx.ext.autodoc',
    'sphinx.ext.napoleon',
    'sphinx.ext.viewcode',
    'sphinx_copybutton',
]
exclude_patterns = ['_build', 'jupyter_execute']

# -- Markdown -----------------------------------------------------------------

myst_enable_extensions = ['dollarmath', 'html_image']
myst_heading_anchors = 3
nb_execution_mode = 'off'  # a test runs the notebook
copybutton_exclude = '.linenos, .gp, .go'

# -- docstrings ----------------------------------------------------------------

autodoc_member_order = 'bysource'
toc_object_entries_show_parents = 'hide'
autodoc_typehints = 'none'  # the docstrings have the types
autodoc_default_options = {'show-inheritance': True}
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True

# -- HTML ----------------------------------------------------------------------

html_theme = 'pydata_sphinx_theme'
html_title = f'mmela {version}'
html_static_path = ['_static']
html_css_files = ['mmela.css']
html_copy_source = False
html_show_sourcelink = False
html_math_renderer = 'mathml'
html_context = {'default_mode': 'auto'}
html_theme_options = {
    'navigation_depth': 2,
    'show_nav_level': 1,
    'secondary_sidebar_items': ['page-toc'],
    'navbar_end': ['theme-switcher'],
    'header_links_before_dropdown': 7,
    'footer_start': ['copyright'],
    'footer_end': [],
    'show_prev_next': True,
}


PICTURE = re.compile(
    r'<picture><source [^>]*srcset="(?P<dark>[^"]+)">'
    r'<img (?P<rest>[^>]*)src="(?P<light>[^"]+)"></picture>'
)


def show_by_theme(app, docname, source):
    """A picture for light and dark, in the form that GitHub knows, as two images
    of which the theme shows one."""
    source[0] = PICTURE.sub(
        r'<img class="only-light" \g<rest>src="\g<light>">'
        r'<img class="only-dark" \g<rest>src="\g<dark>">',
        source[0],
    )


def without_folders(app, docname, source):
    """A link to a folder, which GitHub shows, becomes its text."""
    folder = (DOCS / docname).parent

    def text(link):
        return link[1] if (folder / link[2]).is_dir() else link[0]

    source[0] = re.sub(r'\[([^]]+)\]\(([\w./-]+)\)', text, source[0])


def take_in(app, docname, source):
    """A page that no list of contents names goes to the end of the guide's."""
    if docname == 'guide':
        lists = ('index', 'start', 'guide', 'project', 'results/index')
        text = ''.join((DOCS / f'{name}.md').read_text('utf-8') for name in lists)
        known = set(re.findall(r'^(?:.*<(?:\.\./)?)?(\w+)>?$', text, re.M)) | {'index'}
        new = sorted(n for n in app.project.docnames if '/' not in n and n not in known)
        source[0] = source[0].rstrip()[: -len('```')] + '\n'.join([*new, '```', ''])


def link_back(app, pagename, templatename, context, doctree):
    """Links from a source to the reference lead to the name that the reference has.

    viewcode takes all objects of a module for members of the package that exports the
    first of them.
    """
    if not pagename.startswith('_modules/'):
        return
    objects = app.env.domains['py'].objects
    module = pagename[len('_modules/') :].replace('/', '.')

    def link(match):
        parts = match[1].split('.')
        names = [
            match[1],
            *(f'{module}.{".".join(parts[i:])}' for i in range(len(parts))),
        ]
        for name in names:
            if name in objects:
                page = app.builder.get_relative_uri(pagename, objects[name].docname)
                return f'<a class="viewcode-back" href="{page}#{name}">[docs]</a>'
        return ''

    context['body'] = re.sub(
        r'<a class="viewcode-back" href="[^"#]*#([^"]+)">\[docs\]</a>',
        link,
        context['body'],
    )


def as_mathml(latex, block):
    """A formula as MathML, which browsers show without a script or a font."""
    if block and (r'\\' in latex or '&' in latex):
        latex = rf'\begin{{aligned}}{latex}\end{{aligned}}'
    return tex2mathml(latex, as_block=block)


def visit_math(self, node):
    self.body.append(as_mathml(node.astext(), block=False))
    raise nodes.SkipNode


def visit_math_block(self, node):
    self.body.append(f'<div class="math">{as_mathml(node.astext(), block=True)}</div>')
    raise nodes.SkipNode


def setup(app):
    app.connect('source-read', show_by_theme)
    app.connect('source-read', take_in)
    app.connect('source-read', without_folders)
    app.connect('html-page-context', link_back)
    app.add_html_math_renderer('mathml', (visit_math, None), (visit_math_block, None))
