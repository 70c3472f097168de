"""Code blocks, their marks, links and headings of the documentation."""

import ast
import re
import shlex
from pathlib import Path
from typing import List, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [
        *(ROOT / name for name in ('README.md', 'CONTRIBUTING.md', 'CHANGELOG.md')),
        *(p for p in ROOT.glob('docs/**/*.md') if '_build' not in p.parts),
        *(p for p in ROOT.glob('configs/**/*.md')),
    ]
)
# Allowed reasons in `<!-- not run: REASON -->` before a block
REASONS = (
    'long',  # minutes to hours; `nox -s long` runs it
    'a study',  # minutes to days; `mmela study` runs it
    'installs',
    'needs COCO',
    'needs CIFAR',
    'needs ImageNet',
    'needs a data set',
    'needs a GPU',
    'needs several GPUs',
    'needs a cluster',
    'needs an account',
    'needs other software',
    'a form',  # the reader replaces names in capitals
)
RUN = ('bash', 'python', 'diff', 'yaml')
FENCE = re.compile(
    r'(?:^<!-- (?P<mark>(?:not run|run in)[^\n]*?) -->\n+)?'
    r'^(?P<indent> *)```(?P<language>[a-z]+)\n(?P<text>.*?)^(?P=indent)```$',
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """A code block of a page.

    Attributes:
        page (Path): The page.
        line (int): Line number of its fence.
        language (str): Language from its fence.
        text (str): Content without the indentation of the fence.
        mark (str): Why it is not run, or where it is; empty if it is run here.
    """

    page: Path
    line: int
    language: str
    text: str
    mark: str

    @property
    def where(self) -> str:
        return f'{self.page.relative_to(ROOT)}:{self.line}'


def blocks(page) -> List[Block]:
    """List the code blocks of a page in languages that can run, in order."""
    text = page.read_text('utf-8')
    found = []
    for match in FENCE.finditer(text):
        if match['language'] not in RUN:
            continue
        cut = len(match['indent'])
        lines = [line[cut:] for line in match['text'].splitlines()]
        line = text[: match.start('language')].count('\n') + 1
        code = '\n'.join(lines) + '\n'
        mark = match['mark'] or ''
        found.append(Block(page, line, match['language'], code, mark))
    return found


def commands(block) -> List[List[str]]:
    """Split the commands of a bash block like a shell."""
    lines = block.text.replace('\\\n', ' ').splitlines()
    return [words for words in (shlex.split(x, comments=True) for x in lines) if words]


def applied(diff) -> str:
    """Get the new text of a diff."""
    return ''.join(x[1:] + '\n' for x in diff.splitlines() if not x.startswith('-'))


def is_config(code) -> bool:
    """Whether Python code only sets variables, like a config."""
    return all(
        isinstance(node, ast.Assign)
        and all(isinstance(target, ast.Name) for target in node.targets)
        for node in ast.parse(code).body
    )


def without_code(text) -> str:
    """Remove code blocks and inline code from the text of a page."""
    text = re.sub(r'^( *)```.*?^\1```$', '', text, flags=re.M | re.S)
    return re.sub(r'`[^`\n]+`', 'code', text)


def links(page) -> List[str]:
    """List the targets of a page's links and pictures."""
    text = re.sub(r'^( *)```.*?^\1```$', '', page.read_text('utf-8'), flags=re.M | re.S)
    found = re.findall(r'\]\(([^()\s]+)\)', text)
    return found + re.findall(r'(?:src|srcset|href)="([^"]+)"', text)


def anchors(page) -> List[str]:
    """List the anchors of a page's headings on GitHub."""
    text = re.sub(r'^( *)```.*?^\1```$', '', page.read_text('utf-8'), flags=re.M | re.S)
    found = []
    for heading in re.findall(r'^#+ (.*)$', text, re.M):
        heading = re.sub(r'\[([^]]*)\]\([^)]*\)', r'\1', heading).lower().strip()
        found.append(re.sub(r'[^\w\- ]', '', heading).replace(' ', '-'))
    return found
