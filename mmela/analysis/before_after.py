"""Compare predictions on validation images before the first pruning and at the end."""

import io
import json
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import mmcv
import numpy as np
import torch
from mmengine.visualization import Visualizer
from PIL import Image
from rich.progress import track

from ..convert.networks import read_state_dict
from ..files import replacing, write_text
from ..hooks.layer_attention_pruning_hook import UNPRUNED
from ..structure import layer_attentions
from ..visualization.drawing import LIGHT, plain_text
from .inputs import evenly, load_network, validation_loader
from .records import BeforeAfter, read_record
from .work_dir import Run

FOLDER = 'before_after'
FORMAT = 1
# Areas in pixels from which COCO counts objects as medium and as large
_SIZES = (32**2, 96**2)
THRESHOLD = 0.5  # minimum score of boxes that are always drawn
COLORS = dict(truth=LIGHT.lines[2], right=LIGHT.kept, wrong=LIGHT.pruned)
_EDGE = 512  # pixels of a picture's longer side
_SHOWN = dict(detections=4, classes=6)
_TOP = 3


@dataclass
class Pair:
    """Checkpoints to compare.

    Attributes:
        before (Path | None): The one from before the first pruning, if any.
        after (Path): The last one.
        note (str): Remark on a missing checkpoint; empty if none is missing.
    """

    before: Optional[Path]
    after: Path
    note: str = ''


def find_pair(run: Run) -> Optional[Pair]:
    """Find the last checkpoint before the first pruning, and the final one.

    Args:
        run (Run): The run.

    Returns:
        Pair | None: The pair; if no checkpoint from before the first pruning is left,
        the earliest one from before the last pruning replaces it. None without any
        checkpoint.
    """
    if run.checkpoint is None:
        return None
    prunings = [decision for decision in run.decisions if decision.pruned]
    if not prunings:
        return Pair(None, run.checkpoint, 'Nothing was pruned in this run.')
    first, last = prunings[0], prunings[-1]
    assert first.window is not None and last.window is not None  # set in runs
    kept = run.work_dir / UNPRUNED
    if kept.is_file() and read_state_dict(kept)[0].get('iter') == first.iteration:
        return Pair(kept, run.checkpoint)
    # The hook prunes before mmengine writes the checkpoint of that epoch
    numbered = run.numbered_checkpoints()
    earlier = [n for n in numbered if n < first.window[1]]
    if earlier:
        return Pair(numbered[max(earlier)], run.checkpoint)
    note = (
        f'There is no checkpoint from before the first pruning, after {first.unit} '
        f'{first.window[1]}. LayerAttentionPruningHook saves one, {UNPRUNED}, unless '
        'keep_unpruned=False. A larger max_keep_ckpts of the CheckpointHook can keep '
        'one, too.'
    )
    later = [n for n in numbered if n < last.window[1]]
    if not later:
        return Pair(None, run.checkpoint, note)
    before = numbered[min(later)]
    note += f' This page uses {before.name}, the earliest from before the last pruning.'
    return Pair(before, run.checkpoint, note)


def measure_before_after(
    work_dir: Union[str, Path], images: int = 100, device: Optional[str] = None
) -> Path:
    """Detect or classify validation images with both networks of a run.

    It writes ``before_after.json`` and pictures to ``before_after/`` in the work
    directory, for :func:`mmela.analysis.make_report`. If they exist for the same
    checkpoints and number of images, it does nothing.

    Args:
        work_dir (str | Path): Work directory of a run.
        images (int): Maximum number of images, evenly spaced. Defaults to 100.
        device (str, optional): Device to run on. Defaults to None: an accelerator if
            there is one, or else the CPU.

    Returns:
        Path: ``before_after.json``.

    Raises:
        OSError: If the data are missing.
        SystemExit: If the config cannot be read.
        ValueError: If there is no checkpoint, if it does not fit the config, or if
            the network is neither a detector nor a classifier.
    """
    run = Run(work_dir)
    pair = find_pair(run)
    if pair is None:
        raise ValueError(f'{run.work_dir} has no checkpoint')
    stamp = [
        None if path is None else [path.name, path.stat().st_mtime_ns]
        for path in (pair.before, pair.after)
    ] + [images]
    out = run.work_dir / FOLDER / f'{FOLDER}.json'
    if out.is_file():
        try:
            record = read_record(out, BeforeAfter, 'tools/analysis/report.py')
            if record['stamp'] == stamp:
                return out
        except ValueError:
            pass  # damaged; measure again
    config = run.config_path
    if config is None:
        raise ValueError(f'{run.work_dir} has no config')
    sides: Dict[str, dict] = {}
    for side, path in (('before', pair.before), ('after', pair.after)):
        if path is not None:
            sides[side] = _predict(config, path, images, device)
    some = next(iter(sides.values()))
    kind, dataset, indices = some['kind'], some['dataset'], some['indices']
    infos = [dataset.get_data_info(index) for index in indices]
    out.parent.mkdir(exist_ok=True)
    result: Dict[str, Any] = dict(
        format=FORMAT,
        stamp=stamp,
        kind=kind,
        note=pair.note,
        images=len(indices),
        total=len(dataset),
        classes=[str(name) for name in dataset.metainfo.get('classes') or ()],
        sides={},
    )
    judge = _judge_detections if kind == 'detections' else _judge_classes
    for side, predicted in sides.items():
        judged = judge(infos, predicted['predictions'], result['classes'])
        predicted['right'] = judged.pop('right')
        result['sides'][side] = dict(predicted['about'], **judged)
    show = _show_detections if kind == 'detections' else _show_classes
    result['shown'] = show(infos, sides, result['classes'], out.parent)
    text = json.dumps(result, default=float)
    write_text(out, text + '\n')
    return out


@torch.no_grad()
def _predict(
    config: Path, checkpoint: Path, images: int, device: Optional[str]
) -> Dict[str, Any]:
    """Predict validation images with a checkpoint; return plain arrays."""
    cfg, network = load_network(config, checkpoint, device=device)
    if cfg.model.type.rpartition('.')[2] == 'RPN':
        raise ValueError(f'{config.name} only has region proposals, without classes')
    model: Any = network
    attentions = layer_attentions(model)
    meta = read_state_dict(checkpoint)[0]
    loader = validation_loader(cfg, images)
    subset: Any = loader.dataset
    predictions = []
    for batch in track(loader, description=checkpoint.name):
        for sample in model.val_step(batch):
            if 'pred_instances' in sample:
                instances = sample.pred_instances.cpu().numpy()
                predictions.append(
                    dict(
                        bboxes=np.asarray(instances.bboxes, dtype=float),
                        scores=np.asarray(instances.scores, dtype=float),
                        labels=instances.labels,
                    )
                )
            elif 'pred_score' in sample:
                predictions.append(sample.pred_score.cpu().numpy())
            else:
                raise ValueError(
                    f'{config.name} is neither a detector nor a classifier'
                )
    return dict(
        kind='detections' if isinstance(predictions[0], dict) else 'classes',
        predictions=predictions,
        dataset=subset.dataset,
        indices=subset.indices,
        about=dict(
            checkpoint=checkpoint.name,
            epoch=meta.get('epoch'),
            iteration=meta.get('iter'),
            active=sum(attention.active for attention in attentions.values()),
            attentions=len(attentions),
        ),
    )


# -- detections ----------------------------------------------------------------


def _objects(info: dict) -> List[dict]:
    """Annotated objects of an image, without crowds."""
    return [x for x in info['instances'] if not x.get('ignore_flag')]


def coco_evaluation(
    infos: Sequence[dict], predictions: Sequence[dict], classes: Sequence[str]
) -> Any:
    """Evaluate boxes with pycocotools.

    Args:
        infos (Sequence[dict]): ``width``, ``height`` and ``instances`` of each
            image, as in mmdet's data sets.
        predictions (Sequence[dict]): ``bboxes`` (n, 4) as corners,
            ``scores`` (n, ) and ``labels`` (n, ) for each image.
        classes (Sequence[str]): Names of the classes.

    Returns:
        COCOeval: The evaluation, with ``eval['precision']``,
        (10, 101, classes, 4, 3), and ``eval['recall']``.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, detected = [], []
    for image, (info, prediction) in enumerate(zip(infos, predictions), 1):
        for x in info['instances']:
            truth.append(_annotation(image, x['bbox'], x['bbox_label']))
            truth[-1].update(id=len(truth), iscrowd=int(x.get('ignore_flag', 0)))
        for box, score, label in zip(*(prediction[k] for k in _KEYS)):
            detected.append(dict(_annotation(image, box, label), score=float(score)))
            detected[-1].update(id=len(detected), iscrowd=0)
    with redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        apis = [COCO(), COCO()]
        for api, annotations in zip(apis, (truth, detected)):
            api.dataset = dict(
                images=[dict(id=image) for image in range(1, len(infos) + 1)],
                categories=[dict(id=i, name=name) for i, name in enumerate(classes)],
                annotations=annotations,
            )
            api.createIndex()
        evaluation = COCOeval(*apis, 'bbox')
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


_KEYS = ('bboxes', 'scores', 'labels')


def _annotation(image: int, box: Sequence[float], label: int) -> dict:
    left, top, right, bottom = map(float, box)
    width, height = right - left, bottom - top
    return dict(
        image_id=image,
        category_id=int(label),
        bbox=[left, top, width, height],
        area=width * height,
    )


def _judge_detections(
    infos: Sequence[dict], predictions: Sequence[dict], classes: Sequence[str]
) -> dict:
    evaluation = coco_evaluation(infos, predictions, classes)
    # (IoU, recall, class) for objects of all sizes and at most 100 detections
    precision = evaluation.eval['precision'][:, :, :, 0, -1]
    valid = np.where(precision > -1, precision, np.nan)
    known = ~np.isnan(valid[0, 0])
    counts = np.bincount(
        [x['bbox_label'] for info in infos for x in _objects(info)],
        minlength=len(classes),
    )
    per_class = [
        dict(
            label=int(label),
            objects=int(counts[label]),
            value=float(valid[:, :, label].mean()),
            curve=np.round(valid[0, :, label], 4).tolist(),
        )
        for label in np.flatnonzero(known)
    ]
    matched = {
        number
        for some in evaluation.evalImgs
        if some is not None and some['aRng'] == evaluation.params.areaRng[0]
        for number, match in zip(some['dtIds'], some['dtMatches'][0])
        if match
    }
    ends = np.cumsum([len(prediction['scores']) for prediction in predictions])
    right = np.isin(np.arange(1, ends[-1] + 1), list(matched))
    return dict(
        right=np.split(right, ends[:-1]),
        per_class=per_class,
        mean=float(np.mean([x['value'] for x in per_class])) if per_class else None,
        curves={
            f'{iou:.2f}': np.round(valid[index][:, known].mean(1), 4).tolist()
            for index, iou in enumerate(evaluation.params.iouThrs)
            if known.any() and index in (0, 5)
        },
    )


def choose_images(infos: Sequence[dict], number: int) -> List[int]:
    """Choose images to show, with objects of all sizes but not too many.

    Args:
        infos (Sequence[dict]): See :func:`coco_evaluation`.
        number (int): Number of images.

    Returns:
        list[int]: Indices in ascending order. Images rank by how many of COCO's sizes
        (small, medium, large) they have, then by how close they are to five objects;
        the result is evenly spaced among the best three times ``number``.
    """

    def rank(info: dict) -> Tuple[int, int]:
        boxes = np.array([x['bbox'] for x in _objects(info)]).reshape(-1, 4)
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        sizes = len(set(np.searchsorted(_SIZES, areas, side='right')))
        return sizes, -abs(len(boxes) - 5)

    ranks = [rank(info) for info in infos]
    order = sorted(range(len(infos)), key=lambda i: ranks[i], reverse=True)
    best = sorted(order[: 3 * number])
    return [best[i] for i in evenly(len(best), number)]


def choose_boxes(scores: np.ndarray, objects: int) -> np.ndarray:
    """Choose the boxes to draw in an image.

    Args:
        scores (np.ndarray): Scores of the boxes, (n, ).
        objects (int): Number of annotated objects.

    Returns:
        np.ndarray: Indices of the boxes with a score of at least 0.5, but at least as
        many as there are objects. The best box comes last, to be drawn on top.
    """
    number = max(objects, int((scores >= THRESHOLD).sum()))
    return np.argsort(-scores, kind='stable')[:number][::-1]


def _show_detections(
    infos: Sequence[dict], sides: Dict[str, dict], classes: Sequence[str], out: Path
) -> List[dict]:
    visualizer = Visualizer()
    shown = []
    for number, index in enumerate(choose_images(infos, _SHOWN['detections']), 1):
        info = infos[index]
        image = mmcv.imread(info['img_path'], channel_order='rgb')
        scale = _EDGE / max(image.shape[:2])
        how = 'area' if scale < 1 else 'lanczos'
        image = mmcv.imrescale(image, scale, interpolation=how)
        objects = _objects(info)
        boxes = [x['bbox'] for x in objects]
        texts = [classes[x['bbox_label']] for x in objects]
        drawn = dict(truth=(boxes, texts, [COLORS['truth']] * len(boxes)))
        counts = {}
        for side, predicted in sides.items():
            prediction = predicted['predictions'][index]
            keep = choose_boxes(prediction['scores'], len(objects))
            right = predicted['right'][index][keep]
            labels = prediction['labels'][keep]
            scores = np.floor(100 * prediction['scores'][keep]).astype(int)
            texts = [f'{classes[i]} {score}' for i, score in zip(labels, scores)]
            colors = [COLORS['right' if x else 'wrong'] for x in right]
            drawn[side] = (prediction['bboxes'][keep], texts, colors)
            counts[side] = [int(right.sum()), int((~right).sum())]
        pictures = {}
        for side, (boxes, texts, colors) in drawn.items():
            pictures[side] = f'{number}_{side}.jpg'
            scaled = np.asarray(boxes, dtype=float).reshape(-1, 4) * scale
            scaled = scaled.clip(1, np.tile(image.shape[1::-1], 2) - 2)
            picture = _with_boxes(visualizer, image, scaled, texts, colors)
            with replacing(out / pictures[side]) as temporary:
                Image.fromarray(picture).save(temporary, quality=85, optimize=True)
        shown.append(
            dict(
                image=Path(info['img_path']).name,
                objects=len(objects),
                pictures=pictures,
                counts=counts,
            )
        )
    return shown


def _with_boxes(
    visualizer: Visualizer,
    image: np.ndarray,
    boxes: np.ndarray,
    texts: Sequence[str],
    colors: Sequence[str],
) -> np.ndarray:
    """Draw labelled boxes into an image."""
    visualizer.set_image(image)
    for box, text, color in zip(boxes, texts, colors):
        visualizer.draw_bboxes(torch.tensor(box), edge_colors=color, line_widths=3)
        visualizer.draw_texts(
            plain_text(text),
            torch.tensor([box[0], max(box[1], 14)]),
            font_sizes=9,
            colors='white',
            vertical_alignments='bottom',
            bboxes=dict(facecolor=color, edgecolor='none', pad=0.8),
        )
    return visualizer.get_image()


# -- classes -------------------------------------------------------------------


def _label(info: dict) -> Optional[int]:
    """The class of an image; None unless it has exactly one."""
    label = np.asarray(info['gt_label']).reshape(-1)
    return int(label[0]) if len(label) == 1 else None


def _judge_classes(
    infos: Sequence[dict], predictions: Sequence[np.ndarray], classes: Sequence[str]
) -> dict:
    right: Dict[int, List[bool]] = {}
    for info, scores in zip(infos, predictions):
        label = _label(info)
        if label is not None:
            right.setdefault(label, []).append(int(scores.argmax()) == label)
    per_class = [
        dict(label=label, objects=len(hits), value=100 * sum(hits) / len(hits))
        for label, hits in sorted(right.items())
    ]
    hits = [hit for some in right.values() for hit in some]
    mean = 100 * sum(hits) / len(hits) if hits else None
    return dict(right=None, per_class=per_class, mean=mean)


def _show_classes(
    infos: Sequence[dict], sides: Dict[str, dict], classes: Sequence[str], out: Path
) -> List[dict]:
    shown = []
    for number, index in enumerate(evenly(len(infos), _SHOWN['classes']), 1):
        info = infos[index]
        image = mmcv.imread(info['img_path'], channel_order='rgb')
        scale = 256 / max(image.shape[:2])
        if scale < 1:
            image = mmcv.imrescale(image, scale, interpolation='area')
        name = f'{number}.jpg'
        with replacing(out / name) as temporary:
            Image.fromarray(image).save(temporary, quality=90, optimize=True)
        labels = np.asarray(info['gt_label']).reshape(-1)
        entry: Dict[str, Any] = dict(
            image=Path(info['img_path']).name, picture=name, truth=labels.tolist()
        )
        for side, predicted in sides.items():
            scores = predicted['predictions'][index]
            top = np.argsort(-scores, kind='stable')[:_TOP]
            entry[side] = [[int(i), float(scores[i])] for i in top]
        shown.append(entry)
    return shown
