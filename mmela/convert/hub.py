"""A pruned network as a repository of the Hugging Face Hub, card included."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Set, Union

from mmengine.config import Config

from ..compat.loaders import HUB_CHECKPOINT
from ..engine.data_root import move_paths
from ..engine.tables import decision_table
from ..files import write_text
from ..layers import AttentionState
from ..layers.state import decode
from ..pruning import PruningDecision, PruningReport
from .slim import SlimNetwork, without_pretrained

HUB_CONFIG = 'config.py'
# By default scope: the Hub's name of the task, and how to see the network work
TASKS = {
    'mmdet': ('object-detection', 'mmdet.apis', 'DetInferencer', 'weights'),
    'mmpretrain': (
        'image-classification',
        'mmpretrain',
        'ImageClassificationInferencer',
        'pretrained',
    ),
    'mmseg': ('image-segmentation', 'mmseg.apis', 'MMSegInferencer', 'weights'),
}


def shared_config(cfg: Config) -> Config:
    """Config without what is of one machine and what the weights replace.

    Args:
        cfg (Config): Config of the network.

    Returns:
        Config: A copy without ``work_dir``, ``load_from``, ``resume`` and
        ``launcher``, and without checkpoints that parts of the model would be
        initialized from. An absolute ``data_root`` such as ``/home/ann/coco``
        becomes ``data/coco``, wherever paths begin with it.
    """
    content = cfg.to_dict()
    for key in ('work_dir', 'load_from', 'resume', 'launcher'):
        content.pop(key, None)
    content['model'] = without_pretrained(content['model'])
    for root in sorted(_data_roots(content), key=len, reverse=True):
        content = move_paths(content, root, f'data/{Path(root).name}')
    return Config(content)


def _data_roots(node: Any) -> Set[str]:
    """Absolute folders that a config names as ``data_root``."""
    if isinstance(node, dict):
        root = node.get('data_root')
        own = set()
        if isinstance(root, str) and root.startswith('/') and root.strip('/'):
            own.add(root.rstrip('/'))
        return own.union(*map(_data_roots, node.values()))
    if isinstance(node, (list, tuple)):
        return set().union(*map(_data_roots, node))
    return set()


def report_until(
    work_dir: Union[str, Path], iteration: Optional[int] = None
) -> Optional[PruningReport]:
    """What the pruning hook has decided up to a checkpoint.

    Args:
        work_dir (str | Path): Work directory of the run.
        iteration (int, optional): Iteration of the checkpoint. Defaults to
            None, which takes all decisions.

    Returns:
        PruningReport | None: The report; None without ``pruning.json``.

    Raises:
        OSError: If ``pruning.json`` cannot be opened.
        ValueError: If it is no such file.
    """
    path = Path(work_dir) / 'pruning.json'
    if not path.is_file():
        return None
    report = PruningReport.read(path)
    decisions = tuple(
        decision
        for decision in report.decisions
        if iteration is None or (decision.iteration or 0) <= iteration
    )
    return replace(report, decisions=decisions)


def attention_masks(slim: SlimNetwork) -> Dict[str, str]:
    """Which attentions are left, as Markdown.

    Args:
        slim (SlimNetwork): The network.

    Returns:
        dict[str, str]: By name of the stage, its blocks: pruned ones struck
        out, those that only keep their key and value in parentheses.
    """
    suffix = '.layer_attn.state'
    masks: Dict[str, List[str]] = {}
    for key, state in slim.before.items():
        if key.endswith(suffix):
            stage, _, block = key[: -len(suffix)].rpartition('.')
            form = {
                AttentionState.PRUNED: '~~{}~~',
                AttentionState.VALUE_ONLY: '({})',
            }.get(decode(state)[0], '{}')
            masks.setdefault(stage, []).append(form.format(block))
    return {stage: ' '.join(blocks) for stage, blocks in masks.items()}


def model_card(
    repo: str,
    slim: SlimNetwork,
    metrics: Optional[Dict[str, float]] = None,
    decisions: Sequence[PruningDecision] = (),
    license_name: Optional[str] = None,
) -> str:
    """Write the card of a network.

    Args:
        repo (str): The repository, ``USER/REPO``.
        slim (SlimNetwork): The network.
        metrics (dict[str, float], optional): Its metrics. Defaults to None.
        decisions (Sequence[PruningDecision]): What pruned it. Defaults to
            none.
        license_name (str, optional): License of the weights, by the name that
            the Hub has for it. Defaults to None.

    Returns:
        str: Markdown with a header for the Hub.

    Raises:
        ImportError: If huggingface_hub is not installed.
    """
    from huggingface_hub import EvalResult, ModelCardData

    scope = slim.cfg.get('default_scope', '')
    task, module, inferencer, weights = TASKS.get(scope, (None,) * 4)
    name = repo.rpartition('/')[2]
    dataset = _dataset(slim.cfg)
    data = ModelCardData(
        license=license_name,
        library_name='mmela',
        pipeline_tag=task,
        tags=['mmela', 'layer-attention', 'pruning', *([scope] if scope else [])],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type=task or 'other',
                dataset_type=dataset,
                dataset_name=dataset,
                metric_type=metric,
                metric_value=value,
            )
            for metric, value in (metrics or {}).items()
        ]
        or None,
    )
    epoch = f' after epoch {slim.meta["epoch"]}' if slim.meta.get('epoch') else ''
    left = sum(key.endswith('.layer_attn.state') for key in slim.state_dict)
    model = slim.cfg.model
    backbone = model.get('backbone') or {}
    attention = backbone.get('layer_attention') or dict(type='MRLABase')
    lines = [
        f'---\n{data.to_yaml()}\n---\n',
        f'# {name}\n',
        f'`{model.type}` with the backbone `{backbone.get("type")}` and the layer '
        f'attention `{attention["type"]}`, of which {left} of {slim.attentions} are '
        f'left{epoch}. The weights of pruned attentions are not in the file.\n',
        '## Use\n',
        'It needs mmela and '
        f'{scope or "mmengine"}. A config is code: look at it before you use it.\n',
        f'```bash\nhf download {repo} --local-dir {name}\n'
        f'mmela test {name}/{HUB_CONFIG} {name}/{HUB_CHECKPOINT}\n```\n',
    ]
    if inferencer:
        lines.append(
            f'```python\nfrom {module} import {inferencer}\n\n'
            f"infer = {inferencer}('{name}/{HUB_CONFIG}', {weights}='hf://{repo}')\n"
            "infer('image.jpg', show=True)\n```\n"
        )
    lines.append(
        f"To train it further: `load_from = 'hf://{repo}'` in `{HUB_CONFIG}`.\n"
    )
    if metrics:
        lines += [f'## Metrics{epoch}\n', '| metric | value |', '| --- | --- |']
        lines += [f'| {key} | {value:.4g} |' for key, value in metrics.items()]
        lines.append('')
    lines += [
        '## Layer attentions\n',
        'Blocks by stage: ~~struck out~~ is pruned, and with a block in parentheses '
        'only key and value are kept for later blocks.\n',
        '| stage | blocks with layer attention |',
        '| --- | --- |',
        *(f'| {stage} | {blocks} |' for stage, blocks in attention_masks(slim).items()),
        '',
    ]
    for decision in decisions:
        window = '-'.join(map(str, sorted(set(decision.window or ()))))
        lines += [
            f'## Pruning{f" after {decision.unit} {window}" if window else ""}\n',
            f'{len(decision.layers)} to {len(decision.active)} attentions by '
            f'`{decision.policy}`. KL is the divergence of an '
            "attention's weights from those of the one before it, in nats.\n",
            f'```text\n{decision_table(decision.layers)}\n```\n',
        ]
    return '\n'.join(lines)


def _dataset(cfg: Config) -> str:
    """What the metrics are of, as far as the config says so."""
    dataset = (cfg.get('val_dataloader') or {}).get('dataset') or {}
    return str(dataset.get('type', 'unknown'))


def write_repository(
    folder: Union[str, Path],
    repo: str,
    slim: SlimNetwork,
    metrics: Optional[Dict[str, float]] = None,
    work_dir: Union[None, str, Path] = None,
    license_name: Optional[str] = None,
) -> None:
    """Write what a repository on the Hub holds.

    That is ``model.safetensors``, ``config.py``, ``README.md`` and, of a
    network that the hook has pruned, ``pruning.json``.

    Args:
        folder (str | Path): Where to, new or empty.
        repo (str): The repository, ``USER/REPO``.
        slim (SlimNetwork): The network.
        metrics (dict[str, float], optional): Its metrics. Defaults to None.
        work_dir (str | Path, optional): Work directory of its run. Defaults to
            None.
        license_name (str, optional): As of :func:`model_card`.

    Raises:
        ImportError: If safetensors or huggingface_hub is not installed.
        ValueError: If ``pruning.json`` cannot be read.
    """
    report = None
    if work_dir is not None:
        report = report_until(work_dir, slim.meta.get('iter'))
    decisions = report.decisions if report else ()
    card = model_card(repo, slim, metrics, decisions, license_name)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    slim = slim._replace(cfg=shared_config(slim.cfg))
    slim.save(folder / HUB_CHECKPOINT, folder / HUB_CONFIG)
    write_text(folder / 'README.md', card)
    if report and decisions:
        report.write(folder / 'pruning.json')


def upload(folder: Union[str, Path], repo: str, private: bool = False) -> str:
    """Upload a folder as one commit.

    Args:
        folder (str | Path): The folder.
        repo (str): The repository, ``USER/REPO``, which is made if needed.
        private (bool): Whether a new one is private. Defaults to False.

    Returns:
        str: Address of the repository.

    Raises:
        OSError: If the Hub cannot be reached or refuses it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(library_name='mmela')
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message='Upload by mmela push'
        )
    except HfHubHTTPError as error:
        raise OSError(f'{repo} cannot be uploaded: {error}') from error
    return str(url)
