"""Write a pruned network as a repository of the Hugging Face Hub, with a card."""

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
# By default scope: the Hub's name of the task, and the inferencer to try the network
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
    """Remove machine-specific settings and initial checkpoints from a config.

    Args:
        cfg (Config): Config of the network.

    Returns:
        Config: A copy without ``work_dir``, ``load_from``, ``resume``, ``launcher``
        and the checkpoints that initialize parts of the model. In all paths, an
        absolute ``data_root`` such as ``/home/ann/coco`` becomes ``data/coco``.
    """
    content = cfg.to_dict()
    for key in ('work_dir', 'load_from', 'resume', 'launcher'):
        content.pop(key, None)
    content['model'] = without_pretrained(content['model'])
    for root in sorted(_data_roots(content), key=len, reverse=True):
        content = move_paths(content, root, f'data/{Path(root).name}')
    return Config(content)


def _data_roots(node: Any) -> Set[str]:
    """Absolute folders in the ``data_root`` entries of a config."""
    if isinstance(node, dict):
        root = node.get('data_root')
        roots = set()
        if isinstance(root, str) and root.startswith('/') and root.strip('/'):
            roots.add(root.rstrip('/'))
        return roots.union(*map(_data_roots, node.values()))
    if isinstance(node, (list, tuple)):
        return set().union(*map(_data_roots, node))
    return set()


def report_until(
    work_dir: Union[str, Path], iteration: Optional[int] = None
) -> Optional[PruningReport]:
    """Read the pruning decisions up to a checkpoint.

    Args:
        work_dir (str | Path): Work directory of the run.
        iteration (int, optional): Iteration of the checkpoint. Defaults to
            None, which takes all decisions.

    Returns:
        PruningReport | None: The report; None without ``pruning.json``.

    Raises:
        OSError: If ``pruning.json`` cannot be opened.
        ValueError: If ``pruning.json`` is invalid.
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
    """Format the remaining attentions as Markdown.

    Args:
        slim (SlimNetwork): The network.

    Returns:
        dict[str, str]: The blocks of each stage, by name of the stage. Pruned ones are
        struck out; those that only keep their key and value are in parentheses.
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
        decisions (Sequence[PruningDecision]): Its pruning decisions. Defaults to
            none.
        license_name (str, optional): The Hub's identifier of the license of the
            weights. Defaults to None.

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
        f'attention `{attention["type"]}`. {left} of {slim.attentions} attentions are '
        f'left{epoch}; the file does not hold the weights of pruned ones.\n',
        '## Use\n',
        f'You need mmela and {scope or "mmengine"}. A config is code: read it before '
        'you use it.\n',
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
        f"To train it further, set `load_from = 'hf://{repo}'` in `{HUB_CONFIG}`.\n"
    )
    if metrics:
        lines += [f'## Metrics{epoch}\n', '| metric | value |', '| --- | --- |']
        lines += [f'| {key} | {value:.4g} |' for key, value in metrics.items()]
        lines.append('')
    lines += [
        '## Layer attentions\n',
        'Blocks of each stage: ~~struck out~~ means pruned, and parentheses mean that '
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
            f'From {len(decision.layers)} to {len(decision.active)} attentions, by '
            f'`{decision.policy}`. KL is the divergence, in nats, between the weights '
            'of an attention and of the previous one.\n',
            f'```text\n{decision_table(decision.layers)}\n```\n',
        ]
    return '\n'.join(lines)


def _dataset(cfg: Config) -> str:
    """Type of the validation data set, to which the metrics belong."""
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
    """Write the files of a repository on the Hub.

    These are ``model.safetensors``, ``config.py``, ``README.md`` and, if the hook has
    pruned the network, ``pruning.json``.

    Args:
        folder (str | Path): The folder to write to.
        repo (str): The repository, ``USER/REPO``.
        slim (SlimNetwork): The network.
        metrics (dict[str, float], optional): Its metrics. Defaults to None.
        work_dir (str | Path, optional): Work directory of its run. Defaults to
            None.
        license_name (str, optional): See :func:`model_card`. Defaults to None.

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
        repo (str): The repository, ``USER/REPO``, which is created if needed.
        private (bool): Whether to create it as private. Defaults to False.

    Returns:
        str: URL of the repository.

    Raises:
        OSError: If the Hub cannot be reached or rejects the upload.
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
