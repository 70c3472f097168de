"""Links of the pages, and the figures of papers on them."""

import re
from urllib.parse import unquote

import pytest
import yaml

from tests.helpers.documents import PAGES, ROOT, anchors, links, without_code

PAPERS = yaml.safe_load((ROOT / 'configs' / 'papers.yml').read_text('utf-8'))
QUOTED = PAPERS['quoted']
# A paragraph or table with figures of a paper: `<!-- papers: KEY KEY -->` before it
MARKED = re.compile(r'<!-- papers: ([\w -]+) -->\n(.*?)(?:\n\n|\Z)', re.S)
# But that of a section
NUMBER = re.compile(r'(?<!section )(?<![\w.,/-])[-+]?\d+\.\d+(?![\w.])')
CITED = re.compile(r'\((?:ELA|MRLA|KCLA), (?:tables?|section|figure)')
# Written by tools from configs/papers.yml, with tests of their own
GENERATED = re.compile(r'docs/model_zoo.md|configs/\w+/README.md')


def by_page(page):
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize('page', PAGES, ids=by_page)
def test_links(page):
    """Files, pages and headings that a page points to are there."""
    for target in links(page):
        if re.match(r'https?:|mailto:', target):
            continue
        path, _, anchor = target.partition('#')
        other = (page.parent / unquote(path)).resolve() if path else page
        assert other.exists(), f'{by_page(page)}: {target}'
        if anchor and other.suffix == '.md':
            assert anchor in anchors(other), f'{by_page(page)}: {target}'


@pytest.mark.parametrize('page', PAGES, ids=by_page)
def test_named_files(page):
    """Tools, configs, tests and modules that the text names are there."""
    text = page.read_text('utf-8')
    kinds = r'(?:tools|configs|tests|mmela)/[\w/.-]+?\.(?:py|sh|yml)'
    for path in re.findall(rf'(?<![\w/.:-]){kinds}\b', text):
        if not path.startswith('tools/misc/'):  # of the toolboxes
            assert (ROOT / path).is_file(), f'{by_page(page)}: {path}'


def figures(key):
    """All numbers that configs/papers.yml has under a key of `quoted`."""
    entry = QUOTED[key]
    assert entry['paper']
    rows = [
        row for section in entry.get('sections', []) for row in PAPERS[section]['rows']
    ]
    found = [
        value for row in rows for value in str(row.get('accuracy', '')).split(', ')
    ]
    found += [str(row[k]) for row in rows for k in ('params', 'flops') if k in row]
    return {float(value) for value in found + list(entry.get('figures', [])) if value}


def of_papers(block):
    """What a block has of papers: of a table with such columns these alone."""
    rows = [
        [cell.strip() for cell in line.strip('|').split('|')]
        for line in block.splitlines()
        if line.startswith('|')
    ]
    columns = [i for i, head in enumerate(rows[0] if rows else []) if 'paper' in head]
    return ' '.join(row[i] for row in rows for i in columns) if columns else block


@pytest.mark.parametrize('page', PAGES, ids=by_page)
def test_figures_of_papers(page):
    """They are marked, and those of configs/papers.yml."""
    text = page.read_text('utf-8')
    for keys, block in MARKED.findall(text):
        known = set().union(*map(figures, keys.split()))
        numbers = [float(number) for number in NUMBER.findall(of_papers(block))]
        assert numbers, f'{by_page(page)}: no figure in {block[:60]!r}'
        for number in numbers:
            assert number in known, f'{by_page(page)}: {number} is not in {keys}'
    if not GENERATED.fullmatch(by_page(page)):
        for block in without_code(MARKED.sub('', text)).split('\n\n'):
            found = CITED.search(block) and NUMBER.findall(block)
            assert not found, f'{by_page(page)}: {block[:80]!r} needs a mark'


def test_table_of_detectors():
    """Each cell is the figure of its detector, not just of any."""
    text = (ROOT / 'docs' / 'detection.md').read_text('utf-8')
    (table,) = [block for keys, block in MARKED.findall(text) if keys == 'coco']
    head, _, *rows = [
        [cell.strip() for cell in line.strip('|').split('|')]
        for line in table.splitlines()
    ]
    accuracies = {
        row['config']: row.get('accuracy', '').partition(',')[0]
        for section in ('faster_rcnn', 'mask_rcnn')
        for row in PAPERS[section]['rows']
    }
    bare = dict(zip(['fr50', 'fr101', 'mr50', 'mr101'], QUOTED['coco']['figures']))
    assert len(rows) == 4
    for detector, backbone, *cells in rows:
        short = detector.lower().replace(' ', '-').replace('-r-cnn', '-rcnn')
        depth = backbone.lower().replace('-', '')
        for title, cell in zip(head[2:], cells):
            if title == 'ResNet':
                assert float(cell) == bare[short[0] + depth], (detector, title)
            else:
                config = f'{short}_{depth}_{title.lower()}_fpn_1x_coco'
                assert cell == accuracies[config], config


def test_keys_of_published_networks():
    """The tables "Key by key" of docs/migration.md say what the tool does."""
    from mmela.convert import published_names as names

    pairs = {*names.BLOCK.items(), *names.DEIT_BLOCK.items()}
    for network in names.NETWORKS.values():
        for old, new in network.names.items():
            pairs |= {(old, new), (old, f'layer_attn.{new}')}
    text = (ROOT / 'docs' / 'migration.md').read_text('utf-8')
    sections = [x for x in text.split('\n## ') if x.startswith('Key by key')]
    rows = re.findall(r'^\| `([\w.]+)` \| `([\w.]+)` \|', '\n'.join(sections), re.M)
    assert len(rows) > 15
    for row in rows:
        assert row in pairs, row


def test_measured_results_of_the_readme():
    """Each figure of a row stands on the page of results that the row links to."""
    text = (ROOT / 'README.md').read_text('utf-8')
    rows = re.findall(r'^\| \[[^]]*\]\((docs/results/[\w-]+\.md)\)(.*)$', text, re.M)
    assert len(rows) == 5
    for page, row in rows:
        known = [float(x) for x in NUMBER.findall((ROOT / page).read_text('utf-8'))]
        numbers = NUMBER.findall(without_code(row))
        assert len(numbers) >= 4
        for number in numbers:
            digits = len(number.partition('.')[2])
            close = [abs(float(number) - x) <= 0.5001 * 10**-digits for x in known]
            assert any(close), f'{page}: {number}'


def group(text, name):
    """Rows of a table from the one named so to the next name, by their second cells."""
    rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in text]
    (start,) = [i for i, row in enumerate(rows) if row and row[0] == name]
    found = {}
    for row in rows[start:]:
        if not row or found and row[0]:
            return found
        found[row[1]] = row
    return found


def test_costs_of_the_readme():
    """Time and memory of a ResNet-50 beside plain, from docs/performance.md."""
    page = (ROOT / 'docs' / 'performance.md').read_text('utf-8')
    training = group(page.splitlines(), 'ResNet-50, 224 px, batch 8')
    inference = group(page.split('## Inference')[1].splitlines(), 'default')
    expected = [
        [float(training[name][4]) for name in ('plain', 'mrla-base', 'ela')],
        [
            round(float(training[name][5]) / float(training['plain'][5]), 2)
            for name in ('plain', 'mrla-base', 'ela')
        ],
        [float(inference[name][3]) for name in ('plain', 'mrla-base', 'ela')],
    ]
    text = (ROOT / 'README.md').read_text('utf-8')
    rows = re.findall(r'^\| (?:training|peak|inference).*$', text, re.M)
    found = [[float(cell) for cell in row.split('|')[2:5]] for row in rows]
    assert found == expected


def test_readme_is_short():
    assert len((ROOT / 'README.md').read_text('utf-8').splitlines()) < 100
