"""Run a trained network of mmdet or mmpretrain; write pictures and COCO-format JSON.

The toolboxes' inferencers preprocess, predict and draw. This module checks that a
checkpoint fits, finds the inputs, distributes them over devices and writes files.
"""

import json
import sys
import warnings
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from glob import glob, has_magic
from itertools import islice
from pathlib import Path
from queue import Queue
from typing import (
    Any,
    Deque,
    Dict,
    Iterator,
    List,
    Optional,
    Sequence,
    Set,
    Tuple,
    Union,
)

import cv2
import mmcv
import numpy as np
from mmengine.device import get_device
from mmengine.registry import DATASETS
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from .analysis.inputs import SUFFIXES, as_colours, check_device, find_images
from .attach import input_channels
from .command_line import find_config, one_line
from .compat.versions import is_installed
from .convert.networks import build_network, load_mostly_fitting, open_network
from .files import replacing, write_text

VIDEOS = ('.mp4', '.avi', '.mov', '.mkv', '.webm', '.m4v', '.mpg', '.mpeg', '.wmv')
CAMERA = 'camera:'
PREDICTIONS = 'predictions.json'
_TOP = 5  # classes of an image
_SMALL = 224  # pixels; smaller images have no room for class names


# -- networks ------------------------------------------------------------------


def open_inferencer(
    config: Union[str, Path],
    checkpoint: Union[str, Path],
    device: Optional[str] = None,
    force: bool = False,
) -> Any:
    """Open a toolbox's inferencer for a config and a checkpoint.

    Args:
        config (str | Path): Config of a detector or a classifier, see
            :func:`~mmela.command_line.find_config`.
        checkpoint (str | Path): Its checkpoint, pruned or not, in the format of torch
            or safetensors.
        device (str, optional): Device to run on. Defaults to None: an accelerator if
            there is one, or else the CPU.
        force (bool): Load a checkpoint that does not fit. Defaults to False.

    Returns:
        mmdet.apis.DetInferencer | mmpretrain.ImageClassificationInferencer: The
        inferencer, according to the ``default_scope`` of the config.

    Raises:
        FileNotFoundError: If the config does not exist.
        SystemExit: If the config or the checkpoint cannot be read.
        ValueError: If the checkpoint is from a different network, or the config is
            for neither toolbox.
    """
    path = find_config(str(config))
    cfg, meta, state_dict = open_network(path, checkpoint)
    scope = cfg.get('default_scope')
    if scope not in ('mmdet', 'mmpretrain') or not is_installed(scope):
        raise ValueError(
            f'{config} has default_scope={scope!r}; it must be mmdet or mmpretrain, '
            'and that toolbox must be installed'
        )
    dataset = (cfg.get('test_dataloader') or {}).get('dataset')
    if not dataset:
        raise ValueError(
            f'{config} has no test_dataloader, whose dataset has the pipeline for '
            'images'
        )
    device = device or get_device()
    classes = _lower(meta.get('dataset_meta')).get('classes') or _classes(dataset)
    cfg.model.pop('pretrained', None)
    if scope == 'mmpretrain':
        from mmpretrain import ImageClassificationInferencer

        model = build_network(cfg.model, config)
        load_mostly_fitting(model, state_dict, config, checkpoint, force)
        model._config, model._dataset_meta = cfg, dict(classes=classes)
        return ImageClassificationInferencer(model, device=device)
    from mmdet.apis import DetInferencer

    with warnings.catch_warnings():  # of missing weights, which are loaded below
        warnings.simplefilter('ignore')
        inferencer = DetInferencer(cfg, device=device, show_progress=False)
    load_mostly_fitting(inferencer.model, state_dict, config, checkpoint, force)
    inferencer.model.dataset_meta['classes'] = classes
    return inferencer


def _lower(meta: Any) -> dict:
    """Meta information of a data set with lower-case keys, as versions now use."""
    return (
        {str(k).lower(): v for k, v in meta.items()} if isinstance(meta, dict) else {}
    )


def _classes(dataset: dict) -> Tuple[str, ...]:
    """Classes of a config's data set, without opening its files."""
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    known = _lower(dataset.get('metainfo')).get('classes')
    if not known:
        kind = dataset['type']
        if isinstance(kind, str):
            with DATASETS.switch_scope_and_registry(None) as registry:
                kind = registry.get(kind)
        known = _lower(getattr(kind, 'METAINFO', None)).get('classes')
    if not known:
        raise ValueError(
            'neither the checkpoint nor the config has class names; set metainfo in '
            'the dataset of test_dataloader'
        )
    return tuple(known)


# -- inputs --------------------------------------------------------------------


@dataclass
class Source:
    """An input: an image, a video or a camera.

    Attributes:
        name (str): Its name as given by the user, or as found in a folder.
        path (Path | None): Path of an image or a video; None for a camera.
        camera (int | None): Number of a camera.
    """

    name: str
    path: Optional[Path] = None
    camera: Optional[int] = None

    @property
    def is_stream(self) -> bool:
        """Whether it is a video or a camera."""
        return self.path is None or self.path.suffix.lower() in VIDEOS

    def open(self) -> cv2.VideoCapture:
        """Open a video or camera.

        Returns:
            cv2.VideoCapture: The open video.

        Raises:
            ValueError: If it cannot be opened.
        """
        source: Any = self.camera if self.path is None else str(self.path)
        capture = cv2.VideoCapture(source)
        if not capture.isOpened():
            raise ValueError('cannot be opened as a video')
        return capture

    def count(self, frames: Optional[int]) -> Optional[int]:
        """Number of images to expect.

        Args:
            frames (int | None): Maximum number of frames; None for all.

        Returns:
            int | None: The number; None if unknown, as for a camera.
        """
        if not self.is_stream:
            return 1
        if self.path is None:
            return frames
        try:
            capture = self.open()
        except ValueError:
            return 0
        count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        capture.release()
        if count <= 0:
            return None
        return count if frames is None else min(count, frames)


def find_sources(inputs: Sequence[Union[str, Path]]) -> List[Source]:
    """Find images, videos and cameras.

    Args:
        inputs (Sequence[str | Path]): Images, folders of images (subfolders are not
            searched), patterns such as ``'photos/**/*.jpg'``, videos and
            ``'camera:N'``.

    Returns:
        list[Source]: The sources in this order; those of a folder or pattern are
        sorted by name.

    Raises:
        FileNotFoundError: If an input does not exist, a folder has no images or a
            pattern matches nothing.
        ValueError: If an input is not an image, video or camera.
    """
    sources: List[Source] = []
    for name in map(str, inputs):
        if name.startswith(CAMERA):
            number = name[len(CAMERA) :]
            if not number.isdecimal():
                raise ValueError(
                    f'{name} is not a camera; write {CAMERA}N, such as {CAMERA}0'
                )
            sources.append(Source(name, camera=int(number)))
            continue
        names = [name]
        if has_magic(name) and not Path(name).exists():
            names = sorted(glob(name, recursive=True))
            if not names:
                raise FileNotFoundError(f'no file matches {name}')
        sources += [Source(str(path), path) for path in find_images(names)]
    for source in sources:
        if source.path and source.path.suffix.lower() not in (*SUFFIXES, *VIDEOS):
            raise ValueError(
                f'{source.name} is neither an image ({", ".join(SUFFIXES)}) nor a '
                f'video ({", ".join(VIDEOS)})'
            )
    return sources


@dataclass
class Picture:
    """An image or a frame to run.

    Attributes:
        source (Source): Its source.
        frame (int | None): Number of the frame, from 0; None for an image.
        image (np.ndarray): Pixels as the config loads them: (H, W, C), BGR for
            colours, or (H, W) for a single channel.
        place (int): Number of the frame computed from its time.
        rate (float): Frames per second; 0 if unknown.
    """

    source: Source
    frame: Optional[int]
    image: np.ndarray
    place: int = 0
    rate: float = 0


class Failures:
    """Inputs that failed. Each one is printed at once, in one line.

    Attributes:
        lines (list[str]): The printed lines.
        damaged (set[str]): Names of videos with missing frames.
    """

    def __init__(self) -> None:
        self.lines: List[str] = []
        self.damaged: Set[str] = set()

    def add(self, source: Source, reason: Any) -> None:
        """Record and print a failure.

        Args:
            source (Source): The input.
            reason (Any): The reason, a text or an exception.
        """
        self.lines.append(f'{source.name}: {one_line(reason)[:300]}')
        print(self.lines[-1], file=sys.stderr)


@dataclass
class Reading:
    """How a config loads images.

    Attributes:
        color (str): ``color_type`` of ``LoadImageFromFile``.
        backend (str | None): Its ``imdecode_backend``.
        gray (bool): Whether to convert frames of videos to gray.
    """

    color: str
    backend: Optional[str]
    gray: bool


def _reading(inferencer: Any, sources: Sequence[Source]) -> Reading:
    """How the config of an inferencer loads images.

    Raises:
        ValueError: If there are videos, but the network takes images with neither 1
            nor 3 channels.
    """
    # mmpretrain calls it config
    cfg = inferencer.cfg if hasattr(inferencer, 'cfg') else inferencer.config
    # mmdet's inferencer has replaced the loader with its own, with the same arguments
    loaders = 'LoadImageFromFile', 'InferencerLoader'
    step = next(
        (
            step
            for step in cfg.test_dataloader.dataset.pipeline
            if any(name in str(step['type']) for name in loaders)
        ),
        {},
    )
    color = step.get('color_type', 'color')
    gray = color.startswith('grayscale')
    if color == 'unchanged':
        channels = input_channels(inferencer.model)
        gray = channels == 1
        streams = [source.name for source in sources if source.is_stream]
        if streams and channels not in (1, 3):
            raise ValueError(
                f'{streams[0]} has frames of 3 channels, and the network takes '
                f'{channels}; use images instead of videos'
            )
    return Reading(color, step.get('imdecode_backend', 'cv2'), gray)


def _pictures(
    sources: Sequence[Source],
    frames: Optional[int],
    reading: Reading,
    failures: Failures,
) -> Iterator[Picture]:
    """Iterate over all readable images and frames."""
    for source in sources:
        try:
            if source.is_stream:
                for picture in _frames(source, frames, failures):
                    if reading.gray:
                        picture.image = cv2.cvtColor(picture.image, cv2.COLOR_BGR2GRAY)
                    yield picture
            else:
                image = mmcv.imread(source.path, reading.color, backend=reading.backend)
                if image is None:
                    raise ValueError('cannot be read as an image')
                yield Picture(source, None, image)
        except (ImportError, OSError, ValueError, cv2.error) as error:
            failures.add(source, error)


def _frames(
    source: Source, most: Optional[int], failures: Failures
) -> Iterator[Picture]:
    capture = source.open()
    rate = capture.get(cv2.CAP_PROP_FPS)
    places: List[int] = []
    try:
        while most is None or len(places) < most:
            success, image = capture.read()
            if not success:
                break
            # OpenCV skips damaged frames, so the count alone may be too low
            by_time = round(capture.get(cv2.CAP_PROP_POS_MSEC) * rate / 1000)
            places.append(max(by_time, places[-1] + 1 if places else 0))
            yield Picture(source, len(places) - 1, image, places[-1], rate)
    finally:
        capture.release()
    count = source.count(most)
    if not places:
        raise ValueError('has no readable frame')
    missing = _missing(source, count, places, rate)
    if missing:
        failures.damaged.add(source.name)
        reason = f'{missing} of its {count} frames are missing'
        if source.path.suffix.lower() == '.avi' and places[-1] < (count or 0) - 1:
            reason += '; unless they are at the end, later frame numbers are too low'
        raise ValueError(reason)


def _missing(
    source: Source, count: Optional[int], places: Sequence[int], rate: float
) -> int:
    """Number of frames of a video that could not be read."""
    if source.path is None or count is None or count <= len(places):
        return 0
    if source.path.suffix.lower() in ('.mkv', '.webm'):
        # Their count is the duration, perhaps of the sound track, times the rate,
        # which may vary. Only gaps between otherwise evenly spaced frames count.
        skips = np.diff(places) > 1
        even = not len(skips) or skips.mean() <= 1 / 3
        if count - places[-1] <= rate and not (even and skips.any()):
            return 0
    return count - len(places)


# -- predictions ---------------------------------------------------------------


def _predict(inferencer: Any, pictures: Sequence[Picture]) -> List[Any]:
    """Predict data samples for a batch, with the steps of an inferencer's call.

    If the batch fails, each picture runs alone, and one that fails yields its
    exception instead of a sample.
    """
    images = [picture.image for picture in pictures]
    samples: List[Any] = []
    try:
        for batch in inferencer.preprocess(images, batch_size=len(images)):
            # mmdet yields a tuple with the images first
            batch = batch if isinstance(batch, dict) else batch[1]
            samples += inferencer.forward(batch)
    except Exception as error:  # a pipeline or a network may raise anything
        if len(pictures) == 1:
            return [error]
        return [_predict(inferencer, [picture])[0] for picture in pictures]
    return samples


def _in_order(
    inferencers: Sequence[Any], pictures: Iterator[Picture], batch_size: int
) -> Iterator[Tuple[Picture, Any]]:
    """Iterate over images with predictions; a free device takes the next batch."""
    free: Queue = Queue()
    for inferencer in inferencers:
        free.put(inferencer)

    def run(batch: List[Picture]) -> List[Any]:
        inferencer = free.get()
        try:
            return _predict(inferencer, batch)
        finally:
            free.put(inferencer)

    pending: Deque[Tuple[List[Picture], Future]] = deque()
    with ThreadPoolExecutor(len(inferencers)) as pool:
        while True:
            batch = list(islice(pictures, batch_size))
            if batch:
                pending.append((batch, pool.submit(run, batch)))
            if pending and (not batch or len(pending) > len(inferencers)):
                done, future = pending.popleft()
                yield from zip(done, future.result())
            elif not batch:
                return


def _drawn(inferencer: Any, picture: Picture, sample: Any, score_thr: float):
    """Draw predictions into a picture, with the toolbox's visualizer; BGR."""
    image = as_colours(picture.image)[..., ::-1]
    if 'pred_score' not in sample:
        drawn = inferencer.visualize(
            [image], [sample], return_vis=True, pred_score_thr=score_thr
        )[0]
        return drawn[..., ::-1]
    from mmpretrain.visualization import UniversalVisualizer

    if inferencer.visualizer is None:
        inferencer.visualizer = UniversalVisualizer()
    drawn = inferencer.visualizer.visualize_cls(
        image,
        sample,
        classes=inferencer.classes,
        resize=_SMALL if min(image.shape[:2]) < _SMALL else None,
        draw_gt=False,
    )
    return drawn[..., ::-1]


class _Writer:
    """Writes predictions to files.

    Args:
        out (Path): Folder of the files.
        classes (Sequence[str]): Names of the classes.
        annotations (Path | None): Annotation file in COCO format that provides the
            ids.
    """

    def __init__(
        self, out: Path, classes: Sequence[str], annotations: Optional[Path]
    ) -> None:
        self.out = out
        self.category_ids = list(range(1, len(classes) + 1))
        self.known: Optional[Dict[str, int]] = None
        if annotations is not None:
            self._take_ids(annotations, classes)
        self.images: List[dict] = []
        self.annotations: List[dict] = []
        self.categories = [
            dict(id=i, name=str(name)) for i, name in zip(self.category_ids, classes)
        ]
        self._names: Set[str] = set()
        self._places: List[Tuple[dict, int]] = []  # frame numbers by time
        self._source: Optional[Source] = None  # source of the open video
        self._video: Optional[cv2.VideoWriter] = None
        self._open = ExitStack()

    def _take_ids(self, path: Path, classes: Sequence[str]) -> None:
        try:
            content = json.loads(path.read_text(encoding='utf-8'))
            ids = {str(x['name']): int(x['id']) for x in content['categories']}
            self.known = {
                Path(x['file_name']).name: int(x['id']) for x in content['images']
            }
        except (KeyError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(
                f'{path} is not a COCO annotation file: {error!r}'
            ) from error
        missing = [name for name in classes if name not in ids]
        if missing:
            raise ValueError(f'{path} lacks category {missing[0]!r} of the network')
        self.category_ids = [ids[name] for name in classes]

    def check(self, sources: Sequence[Source]) -> None:
        """Check that the annotation file has all inputs.

        Raises:
            ValueError: If an input is missing there, or two inputs share a name.
        """
        if self.known is None:
            return
        names = [s.path.name if s.path else s.name for s in sources]
        for name in names:
            if name not in self.known:
                raise ValueError(f'the annotation file has no image {name}')
        if len(set(names)) < len(names):
            name = next(name for name in names if names.count(name) > 1)
            raise ValueError(
                f'two inputs are named {name}, which has one id in the annotation file'
            )

    def add(
        self, picture: Picture, predictions: List[dict], drawn: Optional[np.ndarray]
    ) -> None:
        """Add the predictions of an image, and write the drawn image.

        Args:
            picture (Picture): The image.
            predictions (list[dict]): Result of :func:`_plain`.
            drawn (np.ndarray | None): The image to write, BGR; None for none.
        """
        source, frame = picture.source, picture.frame
        image_id = len(self.images) + 1
        name = source.path.name if source.path else source.name.replace(':', '_')
        entry: Dict[str, Any] = dict(
            id=image_id,
            file_name=source.name if source.path else name,
            height=picture.image.shape[0],
            width=picture.image.shape[1],
        )
        if frame is not None:
            entry.update(
                file_name=f'{name}/{frame:06d}.jpg', video=source.name, frame_id=frame
            )
        elif self.known is not None:
            entry.update(id=self.known[name], file_name=name)
        if drawn is not None and frame is None:
            entry['picture'] = self._free(name)
            with replacing(self.out / entry['picture']) as temporary:
                mmcv.imwrite(np.ascontiguousarray(drawn), str(temporary))
        elif drawn is not None:
            self._add_frame(picture, name, drawn)
        if frame is not None:
            self._places.append((entry, picture.place))
        self.images.append(entry)
        for prediction in predictions:
            self.annotations.append(
                dict(
                    id=len(self.annotations) + 1,
                    image_id=entry['id'],
                    category_id=self.category_ids[prediction.pop('label')],
                    **prediction,
                )
            )

    def _free(self, name: str) -> str:
        """A file name that this run has not used yet."""
        stem, suffix, number = Path(name).stem, Path(name).suffix, 1
        while name.lower() in self._names:
            number += 1
            name = f'{stem}_{number}{suffix}'
        self._names.add(name.lower())
        return name

    def _add_frame(self, picture: Picture, name: str, drawn: np.ndarray) -> None:
        if self._source is not picture.source:
            self.close_video()  # the frames of one video arrive together
            path = self.out / self._free(f'{Path(name).stem}.mp4')
            temporary = self._open.enter_context(replacing(path))
            code = cv2.VideoWriter.fourcc(*'mp4v')
            self._video = cv2.VideoWriter(
                str(temporary), code, picture.rate or 25, drawn.shape[1::-1]
            )
            self._source = picture.source
        self._video.write(np.ascontiguousarray(drawn))

    def close_video(self) -> None:
        """Finish the open video."""
        if self._video is not None:
            self._video.release()
        self._open.close()
        self._source = self._video = None

    def close(self, info: dict, damaged: Set[str]) -> Path:
        """Finish the video and write the JSON file.

        Args:
            info (dict): Its ``info``.
            damaged (set[str]): Names of videos with missing frames; their frames are
                numbered by time.

        Returns:
            Path: The file.
        """
        self.close_video()
        for entry, place in self._places:
            if entry['video'] in damaged:
                folder = entry['file_name'].rpartition('/')[0]
                entry.update(file_name=f'{folder}/{place:06d}.jpg', frame_id=place)
        path = self.out / PREDICTIONS
        content = dict(
            info=info,
            images=self.images,
            annotations=self.annotations,
            categories=self.categories,
        )
        write_text(path, json.dumps(content) + '\n')
        return path


def _plain(inferencer: Any, sample: Any, classes: Sequence[str]) -> List[dict]:
    """Convert the predictions of an image to COCO annotations without ids."""
    if 'pred_score' in sample:
        scores = sample.pred_score.cpu().numpy()
        _check_labels(len(scores) - 1, classes)
        top = np.argsort(-scores, kind='stable')[:_TOP]
        return [dict(label=int(i), score=float(scores[i])) for i in top]
    from pycocotools import mask

    result = inferencer.pred2dict(sample)
    if 'labels' not in result:
        raise ValueError('the network returns no boxes; it must be an object detector')
    _check_labels(max(result['labels'], default=0), classes)
    annotations = []
    for index, label in enumerate(result['labels']):
        left, top, right, bottom = result['bboxes'][index]
        width, height = right - left, bottom - top
        entry = dict(
            label=label,
            bbox=[left, top, width, height],
            area=width * height,
            iscrowd=0,
            score=result['scores'][index],
        )
        if 'masks' in result:
            entry['segmentation'] = result['masks'][index]
            entry['area'] = float(mask.area(result['masks'][index]))
        annotations.append(entry)
    return annotations


def _check_labels(label: int, classes: Sequence[str]) -> None:
    if label >= len(classes):
        raise ValueError(
            f'the network predicts class {label}, but there are only {len(classes)} '
            'class names; check dataset_meta of the checkpoint and metainfo of '
            'test_dataloader'
        )


def infer(
    config: Union[str, Path],
    checkpoint: Union[str, Path],
    inputs: Sequence[Union[str, Path]],
    out: Union[str, Path],
    batch_size: int = 1,
    devices: Optional[Sequence[str]] = None,
    score_thr: float = 0.3,
    pictures: bool = True,
    annotations: Union[str, Path, None] = None,
    frames: Optional[int] = None,
    force: bool = False,
) -> Path:
    """Detect objects in images and videos, or classify them, and write files.

    Args:
        config (str | Path): Config of a detector or a classifier.
        checkpoint (str | Path): Its checkpoint; it may be pruned or slim.
        inputs (Sequence[str | Path]): See :func:`find_sources`.
        out (str | Path): New or empty folder. It gets every image and video with its
            predictions, and ``predictions.json``, a COCO data set whose annotations
            have a score. For a classifier these are the five best classes of each
            image, without a box.
        batch_size (int): Images per batch. Defaults to 1.
        devices (Sequence[str], optional): Devices; each runs a copy of the network
            and takes the next batch. Defaults to None: an accelerator if there is
            one, or else the CPU.
        score_thr (float): Minimum score of the boxes to draw; the JSON file has all
            boxes. Defaults to 0.3.
        pictures (bool): Write annotated images and videos. Defaults to True.
        annotations (str | Path, optional): Annotation file in COCO format. The JSON
            file takes the ids of images, by file name, and of categories from it.
            Defaults to None, which counts from 1.
        frames (int, optional): Maximum number of frames of each video or camera.
            Defaults to None: all frames; a camera runs until interrupted.
        force (bool): Load a checkpoint that does not fit. Defaults to False.

    Returns:
        Path: ``predictions.json``.

    Raises:
        OSError: If an input is missing.
        SystemExit: If the config or the checkpoint cannot be read.
        ValueError: If an argument is out of range, the folder is not empty or the
            checkpoint is from a different network. After everything else is written,
            also if an input failed or was incomplete.
    """
    for name, number in (('batch_size', batch_size), ('frames', frames)):
        if number is not None and number < 1:
            raise ValueError(f'{name}={number} is less than 1')
    if not 0 <= score_thr <= 1:
        raise ValueError(f'score_thr={score_thr} is not in [0, 1]')
    sources = find_sources(inputs)
    if not sources:
        raise ValueError('there are no inputs')
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f'{folder} is not an empty folder')
    counts = [source.count(frames) for source in sources]
    total = None if None in counts else sum(counts)
    inferencers = [
        open_inferencer(config, checkpoint, check_device(device), force)
        for device in devices or (None,)
    ]
    main = inferencers[0]
    classes = getattr(main, 'classes', None) or main.model.dataset_meta['classes']
    writer = _Writer(folder, classes, Path(annotations) if annotations else None)
    writer.check(sources)
    reading = _reading(main, sources)
    folder.mkdir(parents=True, exist_ok=True)
    failures = Failures()
    progress = Progress(
        'Inference',
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
    )
    try:
        with progress:
            task = progress.add_task('', total=total)
            results = _in_order(
                inferencers, _pictures(sources, frames, reading, failures), batch_size
            )
            for picture, sample in results:
                progress.advance(task)
                try:
                    if isinstance(sample, Exception):
                        raise sample
                    predictions = _plain(main, sample, classes)
                    drawn = None
                    if pictures:
                        drawn = _drawn(main, picture, sample, score_thr)
                except Exception as error:  # only this picture fails
                    failures.add(picture.source, error)
                    continue
                writer.add(picture, predictions, drawn)
    except KeyboardInterrupt:
        print('interrupted: writing the predictions so far', file=sys.stderr)
    finally:
        info = dict(config=str(config), checkpoint=str(checkpoint))
        path = writer.close(info, failures.damaged)
    if failures.lines:
        names = {line.partition(': ')[0] for line in failures.lines}
        raise ValueError(
            f'{len(names)} of {len(sources)} inputs failed: '
            + '; '.join(failures.lines[:5])
        )
    return path
