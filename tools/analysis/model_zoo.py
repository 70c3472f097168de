"""Count parameters and FLOPs of every config and compare them with the papers.

Reads configs/papers.yml, and writes missing configs of its rows (a network with an
attention of configs/_base_). Builds each model and writes its counts to metafile.yml
and README.md of each folder of configs, and to docs/model_zoo.md. mmengine.analysis
counts the FLOPs for one image, with a multiplication and its addition as one. They
include convolutions, matrix products, normalizations, poolings and upsamplings, but not
activations and not sums and products of maps. All counts are before pruning.

Example:
  mmela model-zoo
  mmela model-zoo cifar imagenet   # only these folders, printed
  mmela model-zoo --reuse          # only count new rows
"""

import logging
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Dict, List, Optional, Sequence

import yaml

from mmela_light.arguments import tool_parser

if TYPE_CHECKING:
    from torch import nn

ROOT = Path(__file__).resolve().parents[2]
PAPERS = ROOT / 'configs' / 'papers.yml'
TABLES = ROOT / 'configs' / 'tables.yml'
PAGE = ROOT / 'docs' / 'model_zoo.md'
DETECTORS = ('faster_rcnn', 'mask_rcnn', 'retinanet')
HEAD = """# Model zoo

`python tools/analysis/model_zoo.py` writes this page. **Here** is what this tool
counts in the networks of this repository, before pruning. **Paper** is what the paper
prints for its own networks. There are no released weights, and all accuracies are the
papers'. [Results](results/index.md) has what we trained.

- Parameters are in millions. For detectors they are the trainable ones, with the stem
  and stage 1 frozen, as in the papers.
- FLOPs are billions of multiply-adds for one image of the given size, counted by
  `mmengine.analysis.FlopAnalyzer`. It also counts normalizations (including BN, which
  an inference engine folds into a convolution), poolings and upsamplings, so the
  figures are 1 to 5 % above those of convolutions and matrix products alone. It counts
  no activations and no sums or products of maps. It also omits the fused self-attention
  of DeiT and CeiT: 2 L^2 C for L tokens in each layer, which is 0.18 in total in CeiT-T
  at 224 pixels and 1.53 at 384. The papers do not name their counters.
- Detectors start from a plain ResNet (`zero_init`). Their frozen stage 1 then has no
  MRLA, and the FLOPs do not include it. Detectors with ECA, RLA_g, BA and DLA-L start
  from a classifier with the same attention, which you train first; SE uses
  MMPretrain's checkpoint.
- Networks for comparison use the schedule of those with layer attention, which is not
  always the schedule of their own papers.
- In these cases the recipes deviate from the papers on purpose, or the papers deviate
  from their authors' code:
  - ResNets on ImageNet have the warm-up of MRLA's code, which its text does not
    mention, and for KCLA the steps at epochs 40, 70 and 90 of its code.
  - Mixup for MRLA's table 12, b is as strong as in MMPretrain's ResNet-50, because the
    paper does not say.
  - MRLA's published command for EfficientNet has RandAugment, random erasing and
    weight decay 1e-5. We use AutoAugment and 4e-5 as in the text, and EfficientNet's
    warm-up of 5 epochs.
  - In MRLA's code for DeiT, attention has no stochastic depth, and with MRLA-base each
    block has 0.1 instead of rates that rise to 0.1. Its code for CeiT normalizes the
    features that blocks add to, has a normalization in the value, and has heads of 32
    channels. Our DeiT, CeiT and PVTv2 follow the text and algorithms 2 and 4. CeiT-T at
    384 pixels is fine-tuned as in DeiT, because MRLA does not describe its own recipe.
  - KCLA's detectors train with the learning rate that its linear scaling gives, 0.01
    and 0.005; its text prints ten times that.
  - The U-Nets: [segmentation](segmentation.md#recipe-and-what-is-different).
- A note follows where the parameters deviate by more than 0.01 M, or by more than 0.1 M
  where the paper prints one decimal.
- Attention residuals ([what they are](layer_attentions.md#attention-residuals),
  arXiv:2603.15031) have no row: their paper is about language models.
"""


ROWS = """## Every row of the papers

These counts cover all tables of the three papers.
[configs/tables.yml](../configs/tables.yml) lists what runs each row: a config below, or
two where a table has CIFAR-10 and CIFAR-100 side by side; MMDetection's own config for
a network without attention, with `tools/train.py mmdet::...`; or, for the ablations of
ELA and KCLA, a variant of a study in [configs/studies](../configs/studies). `mmela
compare` measures times and memory (ELA's table 3, MRLA's table 7). Rows without a
config were quoted by the papers from other work.

"""
NONE = 'none: '


def load_papers() -> dict:
    """Load the papers' figures by folder of ``configs``, with the texts of notes."""
    papers = yaml.safe_load(PAPERS.read_text('utf-8'))
    notes = papers.pop('notes')
    papers.pop('quoted')  # only for the pages
    for section in papers.values():
        for row in section['rows']:
            if 'note' in row:
                row['note'] = notes[row['note']]
    return papers


def bases_of(folder: str, name: str) -> List[str]:
    """Find the two base configs of a row's config.

    These are a network and an attention of ``configs/_base_/attentions``:

    - For MMPretrain, ``NETWORK-ATTENTION_RECIPE`` is ``NETWORK_RECIPE`` with
      ``ATTENTION_cifar`` or ``ATTENTION_in1k``, or with ``ATTENTION_deit`` for networks
      such as ``deit-tiny``.
    - In ``unet``, ``NETWORK_DEPTH_ATTENTION_DATA`` is ``NETWORK_DEPTH_plain_DATA`` with
      ``ATTENTION_unet``.
    - ``DETECTOR_DEPTH_ATTENTION_REST`` is MMDetection's ``DETECTOR_DEPTH_REST`` with
      ``ATTENTION_DEPTH_coco`` or ``ATTENTION_coco``.

    Args:
        folder (str): Folder in ``configs``.
        name (str): Name of the config without suffix.

    Returns:
        list[str]: Value of ``_base_``.

    Raises:
        SystemExit: If no such pair of configs exists.
    """
    candidates = []
    if folder in ('cifar', 'imagenet'):
        network, _, recipe = name.partition('_')
        words = network.split('-')
        for i in range(1, len(words)):
            base = f'./{"-".join(words[:i])}_{recipe}.py'
            attention = '-'.join(words[i:])
            for data in (words[0], 'cifar' if folder == 'cifar' else 'in1k'):
                candidates.append((base, f'{attention}_{data}'))
    elif name.count('_') > 2:
        network, depth, attention, rest = name.split('_', 3)
        if folder == 'unet':
            base = f'./{network}_{depth}_plain_{rest}.py'
            candidates.append((base, f'{attention}_unet'))
        else:
            base = f'mmdet::{folder}/{network}_{depth}_{rest}.py'
            candidates.append((base, f'{attention}_{depth}_coco'))
            candidates.append((base, f'{attention}_coco'))
    for base, attention in candidates:
        bases = [base, f'../_base_/attentions/{attention}.py']
        files = [ROOT / 'configs' / folder / b for b in bases if b.startswith('.')]
        if all(file.is_file() for file in files):
            return bases
    raise SystemExit(
        f'error: configs/{folder}/{name}.py does not exist, and neither do a network '
        'and an attention that match its name: '
        + '; '.join(f'{base} with {attention}.py' for base, attention in candidates)
    )


def write_config(folder: str, name: str) -> None:
    """Write the config of a row that has no file yet.

    Args:
        folder (str): Folder in ``configs``.
        name (str): Name of the config without suffix.

    Raises:
        SystemExit: If its base configs do not exist.
    """
    path = ROOT / 'configs' / folder / f'{name}.py'
    if path.is_file():
        return
    from mmela.files import write_text

    bases = bases_of(folder, name)
    text = f'_base_ = {bases!r}\n'
    if len(text) > 89:
        text = '_base_ = [\n' + ''.join(f'    {base!r},\n' for base in bases) + ']\n'
    write_text(path, text + '\nmodel = dict(backbone=_base_.backbone)\n')


def build(folder: str, name: str) -> 'nn.Module':
    """Build the model of a config without pre-trained weights.

    Args:
        folder (str): Folder in ``configs``.
        name (str): Name of the config without suffix.

    Returns:
        nn.Module: The model in evaluation mode.
    """
    from mmengine.config import Config
    from mmengine.registry import MODELS, DefaultScope, init_default_scope

    import mmela  # noqa: F401

    cfg = Config.fromfile(ROOT / 'configs' / folder / f'{name}.py')
    # Configs belong to different toolboxes, and a scope name can only be used once
    DefaultScope._instance_dict.clear()
    init_default_scope(cfg.default_scope)
    if cfg.default_scope == 'mmdet':
        cfg.model.backbone.init_cfg = None
    model = MODELS.build(cfg.model)
    model.eval()
    return model


def count_parameters(folder: str, model: 'nn.Module') -> float:
    """Count millions of parameters; only trainable ones for a detector."""
    model.train()  # freezes stages
    trainable = folder in DETECTORS
    count = sum(
        p.numel() for p in model.parameters() if p.requires_grad or not trainable
    )
    model.eval()
    return count / 1e6


def count_macs(model: 'nn.Module', size: Sequence[int]) -> float:
    """Count billions of multiply-adds for one image of (height, width)."""
    from mmela.analysis.complexity import ForImages, count_flops

    return count_flops(ForImages(model), size) / 1e9


def parameters_agree(row: dict, count: float) -> bool:
    """Whether a count in M agrees with the paper's figure; True if there is none.

    The tolerance is 0.01 M, or 0.1 M if the paper prints one decimal.
    """
    if 'params' not in row:
        return True
    decimals = len(row['params'].partition('.')[2])
    return abs(count - float(row['params'])) <= (0.1 if decimals < 2 else 0.01) + 1e-9


def count_section(folder: str, section: dict, reuse: bool = False) -> List[dict]:
    """Count all rows of a folder.

    Args:
        folder (str): Folder in ``configs``.
        section (dict): The folder's part of configs/papers.yml.
        reuse (bool): Use existing counts of the metafile. Defaults to False.

    Returns:
        list[dict]: The rows with ``size``, ``count`` and ``macs``.
    """
    from mmengine.utils import ProgressBar

    known = read_metafile(folder) if reuse else {}
    counted = []
    missing = [row for row in section['rows'] if row['config'] not in known]
    bar = ProgressBar(len(missing)) if missing else None
    for row in section['rows']:
        size = tuple(row.get('input', section['input']))
        data = known.get(row['config'])
        if data:
            count, macs = data[parameters_key(folder)], data['FLOPs (G)']
        else:
            model = build(folder, row['config'])
            count = round(count_parameters(folder, model), 3)
            macs = float(f'{count_macs(model, size):.4g}')
            bar.update()
        counted.append(dict(row, size=size, count=count, macs=macs))
    return counted


def parameters_key(folder: str) -> str:
    """Name of the parameters in a metafile."""
    return 'Trainable Parameters (M)' if folder in DETECTORS else 'Parameters (M)'


def read_metafile(folder: str) -> Dict[str, dict]:
    """Read the ``Metadata`` of the models in a metafile by name; empty without one."""
    path = ROOT / 'configs' / folder / 'metafile.yml'
    if not path.is_file():
        return {}
    models = yaml.safe_load(path.read_text('utf-8'))['Models']
    return {model['Name']: model['Metadata'] for model in models}


def metafile(folder: str, section: dict, rows: List[dict]) -> str:
    """Create the content of ``configs/<folder>/metafile.yml``."""
    name = section['collection']['Name']
    kind = parameters_key(folder)
    models = []
    for row in rows:
        data = {
            kind: row['count'],
            'FLOPs (G)': row['macs'],
            'FLOPs Counter': 'mmengine.analysis.FlopAnalyzer, multiply-adds',
            'Input Size': '{}x{}'.format(*row['size']),
        }
        if 'params' in row:
            data['Paper'] = row['paper']
            data[f'{kind} in the Paper'] = float(row['params'])
        if 'flops' in row:
            data['FLOPs (G) in the Paper'] = row['flops']
        if 'accuracy' in row:
            data[f'{section["metric"]} in the Paper'] = row['accuracy']
        models.append(
            {
                'Name': row['config'],
                'In Collection': name,
                'Config': f'configs/{folder}/{row["config"]}.py',
                'Metadata': data,
            }
        )
    text = yaml.safe_dump(
        dict(Collections=[section['collection']], Models=models),
        sort_keys=False,
        width=79,
    )
    return (
        '# Written by tools/analysis/model_zoo.py. All counts are before '
        'pruning.\n' + text
    )


def table(section: dict, rows: List[dict], link: str = '') -> str:
    """Create the table of a folder's rows, with notes.

    Args:
        section (dict): The folder's part of configs/papers.yml.
        rows (list[dict]): Result of :func:`count_section`.
        link (str): Relative link from the page to the folder. Defaults to ''.

    Returns:
        str: Markdown.
    """
    metric = section.get('metric')
    head = ['config', 'parameters here', 'paper', 'FLOPs here', 'paper', 'source']
    if metric:
        head.insert(1, f'{metric}, paper')
    lines = [
        'Input {} x {} pixels unless the row says otherwise.'.format(*section['input']),
        '',
        f'| {" | ".join(head)} |',
        f'|{" --- |" * len(head)}',
    ]
    notes: List[str] = []
    for row in rows:
        mark = ''
        if row.get('note'):
            if row['note'] not in notes:
                notes.append(row['note'])
            mark = f' [{notes.index(row["note"]) + 1}]'
        name = f'[{row["config"]}]({link}{row["config"]}.py)'
        if list(row['size']) != list(section['input']):
            name += ' ({} x {})'.format(*row['size'])
        cells = [
            name,
            f'{row["count"]:.3f}{mark}',
            row.get('params', ''),
            f'{row["macs"]:.4g}',
            row.get('flops', ''),
            row.get('paper', ''),
        ]
        if metric:
            cells.insert(1, row.get('accuracy', ''))
        lines.append(f'| {" | ".join(map(str, cells))} |')
    lines += [''] + [f'[{i}] {note}\n' for i, note in enumerate(notes, 1)]
    return '\n'.join(lines)


def page_section(folder: str, section: dict, rows: List[dict]) -> str:
    """Create the section of a folder in docs/model_zoo.md."""
    return f'## {section["title"]}\n\n{table(section, rows, f"../configs/{folder}/")}'


def load_tables() -> Dict[str, Dict[str, List[str]]]:
    """Load the config or study of each row of the papers' tables."""
    return yaml.safe_load(TABLES.read_text('utf-8'))


def tables_section(tables: Dict[str, Dict[str, List[str]]]) -> str:
    """Create the section of docs/model_zoo.md that counts the rows of papers' tables.

    Args:
        tables (dict[str, dict[str, list[str]]]): Result of :func:`load_tables`.

    Returns:
        str: Markdown.
    """
    lines = [
        '| paper | tables | rows | that run here | without (table) |',
        '| --- ' * 5 + '|',
    ]
    total = running = 0
    for paper, rows in tables.items():
        missing = [
            f'{entry[len(NONE) :]} ({number})'
            for number, entries in rows.items()
            for entry in entries
            if entry.startswith(NONE)
        ]
        names = ', '.join(
            f'{name} twice' if times == 2 else name
            for name, times in Counter(missing).items()
        )
        count = sum(map(len, rows.values()))
        total += count
        running += count - len(missing)
        first, *_, last = rows
        lines.append(
            f'| {paper} | {first} to {last} | {count} | {count - len(missing)} '
            f'| {names or "none"} |'
        )
    lines.append(f'| all | | {total} | {running} | {total - running} |')
    return ROWS + '\n'.join(lines) + '\n'


def page(sections: Sequence[str]) -> str:
    """Create the content of docs/model_zoo.md."""
    parts = [HEAD, tables_section(load_tables()), *sections]
    return '\n'.join(parts).rstrip('\n') + '\n'


def readme(section: dict, rows: List[dict]) -> str:
    """Create the content of ``configs/<folder>/README.md``."""
    others = ''.join(
        f'- `{pattern}`: {text}\n'
        for pattern, text in section.get('others', {}).items()
    )
    return (
        f'# {section["title"]}\n\n{section["text"]}\n\n'
        'Parameters are in millions and FLOPs in billions of multiply-adds, before '
        'pruning. [The model zoo](../../docs/model_zoo.md) explains the counts, and '
        '[configs](../README.md) how a config is put together.\n\n'
        f'{table(section, rows)}'
        + (f'\nFurther configs:\n\n{others}' if others else '')
    ).rstrip('\n') + '\n'


def main(argv: Optional[List[str]] = None) -> None:
    parser = tool_parser('model-zoo', __doc__)
    papers = load_papers()
    parser.add_argument(
        'folders',
        nargs='*',
        help=f'only count these folders, and print the result: {", ".join(papers)}',
    )
    parser.add_argument(
        '--reuse', action='store_true', help='only count rows missing in the metafiles'
    )
    args = parser.parse_args(argv)
    unknown = set(args.folders) - set(papers)
    if unknown:
        raise SystemExit(
            f'error: there is no folder {sorted(unknown)[0]}; allowed are '
            f'{", ".join(papers)}'
        )
    from mmengine.logging import MMLogger

    from mmela.files import write_text

    MMLogger.get_current_instance().setLevel(logging.ERROR)
    sections: List[str] = []
    for folder, section in papers.items():
        if args.folders and folder not in args.folders:
            continue
        for row in section['rows']:
            write_config(folder, row['config'])
        rows = count_section(folder, section, args.reuse)
        for row in rows:
            if not parameters_agree(row, row['count']) and 'note' not in row:
                print(
                    f'{row["config"]}: {row["count"]} M here, '
                    f'{row["params"]} M in {row["paper"]}, and no note'
                )
        path = ROOT / 'configs' / folder
        write_text(path / 'metafile.yml', metafile(folder, section, rows))
        write_text(path / 'README.md', readme(section, rows))
        sections.append(page_section(folder, section, rows))
    if args.folders:
        print('\n'.join(sections))
    else:
        write_text(PAGE, page(sections))


if __name__ == '__main__':
    main()
