"""Content of an HTML page."""

from html.parser import HTMLParser
from pathlib import Path


class Page(HTMLParser):
    """References, text and table cells of a page."""

    def __init__(self, path):
        super().__init__()
        self.sources, self.text, self.rows, self.tags = [], '', [], []
        self.in_cell = False
        self.feed(Path(path).read_text(encoding='utf-8'))
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [
            v for k, v in attrs if k in ('src', 'href', 'srcset', 'action')
        ]
        if tag == 'tr':
            self.rows.append([])
        elif tag in ('td', 'th'):
            self.rows[-1].append('')
            self.in_cell = True

    def handle_endtag(self, tag):
        if tag in ('dt', 'dd'):
            self.text += ' '
        if tag in ('td', 'th'):
            self.in_cell = False

    def handle_data(self, data):
        self.text += data
        if self.in_cell:
            self.rows[-1][-1] += data.strip()


def check_offline(page):
    """Check that the page loads nothing from outside."""
    assert page.sources
    for source in page.sources:
        assert source.startswith('data:'), source[:80]
    assert not {'script', 'iframe', 'object', 'embed'} & set(page.tags)
