"""The site: it builds without a warning, opens offline, and all its links lead on."""

import json
import re
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest

from tests.helpers import fresh
from tests.helpers.documents import ROOT

for module in ('mmdet', 'mmpretrain', 'mmseg'):  # the reference is read from them
    pytest.importorskip(module)
for module in ('sphinx', 'myst_nb', 'pydata_sphinx_theme', 'sphinx_copybutton'):
    pytest.importorskip(module, reason='needs requirements/docs.txt')


class Html(HTMLParser):
    """What a page of the site loads, links to and has names for."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.links, self.ids, self.tags = [], [], set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.add(tag)
        self.ids |= {attrs[key] for key in ('id', 'name') if attrs.get(key)}
        for key in ('src', 'srcset', 'data', 'poster'):
            if attrs.get(key):
                self.loads.append(attrs[key])
        if attrs.get('href'):
            (self.loads if tag == 'link' else self.links).append(attrs['href'])


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    """Folder of the site, built as the command says that users have."""
    out = tmp_path_factory.mktemp('site') / 'html'
    fresh.check(fresh.module('sphinx'), '-q', '-W', '--keep-going', 'docs', out)
    return out


@pytest.fixture(scope='module')
def pages(site):
    return {
        path.relative_to(site).as_posix(): Html(path.read_text('utf-8'))
        for path in site.rglob('*.html')
        if '_static' not in path.parts
    }


def test_every_page_is_there(pages):
    sources = (ROOT / 'docs').rglob('*.*')
    names = {
        path.relative_to(ROOT / 'docs').with_suffix('.html').as_posix()
        for path in sources
        if path.suffix in ('.md', '.ipynb')
        and not {'_build', 'jupyter_execute'} & set(path.parts)
    }
    assert names <= set(pages)
    assert {'index.html', 'search.html', 'genindex.html'} <= set(pages)


def test_nothing_is_loaded_from_elsewhere(site, pages):
    """But for badges, of which there are none."""
    for name, page in pages.items():
        for source in page.loads:
            assert not re.match(r'(https?:)?//', source), f'{name} loads {source}'
    for style in site.rglob('*.css'):
        found = re.findall(
            r'(?:url\(|@import )\s*["\']?(?:https?:)?//[^)"\']+', style.read_text()
        )
        assert not found, f'{style.name} loads {found}'


def test_links_lead_on(site, pages):
    """Files, pages and anchors are there."""
    for name, page in pages.items():
        for target in page.links + page.loads:
            parts = urlsplit(target)
            if parts.scheme:
                continue
            path = (
                (site / name).parent / unquote(parts.path)
                if parts.path
                else site / name
            )
            path = path.resolve()
            assert path.is_file(), f'{name}: {target}'
            if parts.fragment and path.suffix == '.html':
                other = pages[path.relative_to(site.resolve()).as_posix()]
                assert unquote(parts.fragment) in other.ids, f'{name}: {target}'


def test_formulas_and_pictures(pages):
    assert 'math' in pages['layer_attentions.html'].tags
    assert 'math' in pages['api/layers.html'].tags
    pictures = pages['get_started.html'].loads
    assert sum('_dark' in source for source in pictures) == 2


def test_reference_links_to_its_sources(pages):
    """Every page of the reference does, and its index has a line for each."""
    names = [n for n in pages if n.startswith('api/') and n != 'api/index.html']
    assert len(names) >= 10
    index = pages['api/index.html'].links
    for name in names:
        assert any('_modules/mmela' in link for link in pages[name].links), name
        assert index.count(name[len('api/') :]) >= 2  # in its table and at the side


def test_lines_of_diffs_are_coloured(site):
    text = (site / 'step_by_step.html').read_text('utf-8')
    assert 'highlight-diff' in text and '<span class="gi">' in text
    style = (site / '_static' / 'mmela.css').read_text('utf-8')
    for theme in ('light', 'dark'):
        for token in ('gi', 'gd'):
            rule = rf'data-theme="{theme}"\] div.highlight-diff \.{token} {{ color'
            assert re.search(rule, style), (theme, token)


def test_threads_of_the_faq_are_links(pages):
    threads = [x for x in pages['faq.html'].links if x.startswith('https://github')]
    assert len(threads) > 30
    assert all(re.search(r'/issues/\d+$', thread) for thread in threads)


def test_search_works_without_a_server(site):
    """Its index is a script, not something to be fetched."""
    text = (site / 'searchindex.js').read_text('utf-8')
    index = json.loads(re.fullmatch(r'Search\.setIndex\((.*)\)\s*', text, re.S)[1])
    names = [index['docnames'][i] for i in index['titleterms']['polici']]
    assert 'policies' in names
    assert 'searchindex.js' in (site / 'search.html').read_text('utf-8')
