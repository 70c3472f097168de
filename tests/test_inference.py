"""mmela infer: inputs, devices, what is written, and what is refused."""

import json
import runpy
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmela import inference
from mmela.convert.networks import check_fit
from mmela.convert.published import strip_module
from mmela.inference import PREDICTIONS, find_sources, infer, open_inferencer
from mmela.layers import AttentionState
from mmela.layers.state import encode
from tests.helpers.networks import classifier, save

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / 'tools' / 'infer.py'
CLASSES = ('ant', 'bee', 'wasp')


def detector():
    pytest.importorskip('mmdet')
    pytest.importorskip('mmcv.ops', exc_type=ImportError)
    cfg = Config.fromfile(
        ROOT / 'configs/demo/faster-rcnn_r50-narrow_ela_fpn_shapes.py'
    )
    cfg.model.backbone.update(depth=18, base_channels=8)
    cfg.model.backbone.layer_attention.head_dim = 8
    cfg.model.neck.update(in_channels=[8, 16, 32, 64], out_channels=16)
    cfg.model.rpn_head.update(in_channels=16, feat_channels=16)
    cfg.model.roi_head.bbox_roi_extractor.out_channels = 16
    cfg.model.roi_head.bbox_head.update(in_channels=16, num_classes=3)
    cfg.model.test_cfg.rcnn.update(score_thr=0.0, max_per_img=5)
    cfg.test_dataloader.dataset.metainfo = dict(classes=CLASSES)
    return cfg


@pytest.fixture(scope='module')
def network(tmp_path_factory):
    """A detector, one attention of which is pruned: config and checkpoint."""
    folder = tmp_path_factory.mktemp('detector')
    pruned = ['backbone.layer1.1.layer_attn']
    config, _ = save(folder, 'narrow', detector(), pruned)
    return config, folder / 'narrow_pruned.pth'


@pytest.fixture(scope='module')
def photos(shapes):
    return shapes / 'val2017'


def read(path):
    content = json.loads(Path(path).read_text())
    assert {x['image_id'] for x in content['annotations']} <= {
        x['id'] for x in content['images']
    }
    return content


def boxes(content):
    """By image, its detections without ids."""
    return [
        [
            [*x['bbox'], x['score'], x['category_id']]
            for x in content['annotations']
            if x['image_id'] == image['id']
        ]
        for image in content['images']
    ]


@pytest.fixture(scope='module')
def alone(network, photos, tmp_path_factory):
    """Image by image on one device."""
    out = tmp_path_factory.mktemp('alone') / 'out'
    return out, read(infer(*network, [photos], out, score_thr=0.0))


def test_the_same_as_mmdet_alone(network, photos, alone):
    """mmdet's inferencer, loaded by itself, on files."""
    from mmdet.apis import DetInferencer

    inferencer = DetInferencer(*map(str, network), device='cpu', show_progress=False)
    names = [str(path) for path in sorted(photos.iterdir())]
    expected = inferencer(names)['predictions']
    out, content = alone
    assert [x['file_name'] for x in content['images']] == names
    assert content['categories'] == [
        dict(id=i, name=name) for i, name in enumerate(CLASSES, 1)
    ]
    for found, image in zip(boxes(content), expected):
        assert len(found) == 5
        left, top, right, bottom = np.transpose(image['bboxes'])
        rows = [left, top, right - left, bottom - top, image['scores']]
        rows.append(np.array(image['labels']) + 1)
        assert np.allclose(found, np.transpose(rows), atol=1e-4)
    for name in names:
        drawn, image = cv2.imread(str(out / Path(name).name)), cv2.imread(name)
        assert drawn.shape == image.shape and not np.array_equal(drawn, image)


def test_batches_and_devices(network, photos, alone, tmp_path):
    found = infer(
        *network, [photos], tmp_path / 'out', batch_size=2, devices=['cpu', 'cpu'],
        pictures=False,
    )  # fmt: skip
    assert [x.name for x in (tmp_path / 'out').iterdir()] == [PREDICTIONS]
    content = read(found)
    assert [x['file_name'] for x in content['images']] == [
        x['file_name'] for x in alone[1]['images']
    ]
    for ours, theirs in zip(boxes(content), boxes(alone[1])):
        assert np.allclose(ours, theirs, atol=1e-3)


@pytest.fixture(scope='module')
def clip(photos, tmp_path_factory):
    path = tmp_path_factory.mktemp('clip') / 'clip.avi'
    code = cv2.VideoWriter.fourcc(*'MJPG')
    writer = cv2.VideoWriter(str(path), code, 5, (96, 96))
    for image in sorted(photos.iterdir()):
        writer.write(cv2.imread(str(image)))
    writer.release()
    return path


def test_video_camera_and_names(network, photos, clip, tmp_path, monkeypatch):
    """All in one call; a camera that shows the clip; one image twice."""
    original = inference.Source.open

    def open_camera(self):
        return original(inference.Source('', clip) if self.path is None else self)

    monkeypatch.setattr(inference.Source, 'open', open_camera)
    image = sorted(photos.iterdir())[0]
    inputs = [image, clip, clip, str(photos / '*1.png'), 'camera:0']
    content = read(infer(*network, inputs, tmp_path / 'out', frames=2))
    one = Path(image).name
    assert [x['file_name'] for x in content['images']] == [
        str(image),
        'clip.avi/000000.jpg',
        'clip.avi/000001.jpg',
        'clip.avi/000000.jpg',
        'clip.avi/000001.jpg',
        str(image),
        'camera_0/000000.jpg',
        'camera_0/000001.jpg',
    ]
    names = {x.name for x in (tmp_path / 'out').iterdir()}
    again = one.replace('.png', '_2.png')
    assert names == {one, again, 'clip.mp4', 'clip_2.mp4', 'camera_0.mp4', PREDICTIONS}
    video = cv2.VideoCapture(str(tmp_path / 'out' / 'clip.mp4'))
    assert video.get(cv2.CAP_PROP_FRAME_COUNT) == 2
    assert video.get(cv2.CAP_PROP_FPS) == 5
    found = boxes(content)
    assert found[0] == found[5] and found[1] == found[3] == found[6]


def damaged(path, how):
    """Half of a file, or zeros in the middle of it."""
    content = bytearray(path.read_bytes())
    middle, part = len(content) // 2, len(content) // 8
    if how == 'half':
        del content[middle:]
    else:
        content[middle : middle + part] = bytes(part)
    path.write_bytes(content)


@pytest.mark.parametrize('suffix', ['.avi', '.mkv'])
@pytest.mark.parametrize('how', ['half', 'hole'])
def test_damaged_videos(network, photos, tmp_path, tool, how, suffix):
    """What is missing is told, and what is there has its own numbers."""
    clip, noise = tmp_path / f'clip{suffix}', np.random.default_rng(0)
    code = cv2.VideoWriter.fourcc(*'MJPG')
    writer = cv2.VideoWriter(str(clip), code, 10, (64, 48))
    for _ in range(20):
        writer.write(noise.integers(0, 255, (48, 64, 3), np.uint8))
    writer.release()
    out = tmp_path / 'out'
    read(infer(*network, [clip], out))  # a whole one
    damaged(clip, how)
    image = next(photos.iterdir())
    message = tool(*network, clip, image, '--out', tmp_path / 'new')
    content = read(tmp_path / 'new' / PREDICTIONS)
    frames = [x['frame_id'] for x in content['images'] if 'video' in x]
    assert 0 < len(frames) < 20 and len(content['images']) == len(frames) + 1
    lacking = 20 - len(frames)
    assert f'1 of 2 inputs failed: {clip}: {lacking} of its 20 frames are' in message
    if how == 'half' or suffix == '.avi':  # which has no times
        assert frames == list(range(len(frames)))
        assert ('numbers are too low' in message) == (suffix == '.avi')
    else:
        assert frames[0] == 0 and frames[-1] == 19
        assert frames == sorted(set(frames))
    names = [x['file_name'] for x in content['images'] if 'video' in x]
    assert names == [f'{clip.name}/{number:06d}.jpg' for number in frames]


def test_frames_of_videos_whose_count_is_estimated():
    """A sound that is longer, or a rate that varies, is no damage."""
    mkv = inference.Source('a.mkv', Path('a.mkv'))
    even, holed = list(range(100)), [*range(40), *range(60, 120)]
    varying = [*range(0, 60, 3), *range(60, 90)]
    for places, count, missing in [
        (even, 110, 0), (even, 100, 0), (even, 200, 100), (holed, 120, 20),
        (varying, 92, 0),
    ]:  # fmt: skip
        assert inference._missing(mkv, count, places, 30.0) == missing
    avi = inference.Source('a.avi', Path('a.avi'))
    assert inference._missing(avi, 101, even, 30.0) == 1
    assert inference._missing(inference.Source('', camera=0), 9, even, 30.0) == 0


def test_one_of_each_that_fails(network, photos, tmp_path, tool, capsys):
    """Each a line, and the others go on, in a batch with them too."""
    video, text = tmp_path / 'no.mp4', tmp_path / 'no.jpg'
    video.write_text('no video')
    text.write_text('no image')
    thin = tmp_path / 'thin.png'
    cv2.imwrite(str(thin), np.zeros((1, 5000, 3), np.uint8))
    out = tmp_path / 'out'
    inputs = [video, thin, text, photos]
    message = tool(*network, *inputs, '--out', out, '--batch-size', 4)
    assert '3 of 6 inputs failed' in message
    told = capsys.readouterr().err
    for path in (video, thin, text):
        assert f'{path}: ' in message and told.count(f'{path}: ') == 1
    assert f'{video}: cannot be opened as a video' in told
    assert len(read(out / PREDICTIONS)['images']) == 3
    assert len(list(out.iterdir())) == 4


def test_more_classes_than_names(network, photos, tmp_path, tool):
    config, checkpoint = network
    state_dict = torch.load(checkpoint)
    # Each image has detections of the last class, however the weights started.
    state_dict['roi_head.bbox_head.fc_cls.bias'][2] = 100
    checkpoint = tmp_path / 'last_class.pth'
    torch.save(state_dict, checkpoint)
    cfg = Config.fromfile(config)
    cfg.test_dataloader.dataset.metainfo = dict(classes=CLASSES[:1])
    cfg.dump(tmp_path / 'short.py')
    message = tool(tmp_path / 'short.py', checkpoint, photos, '--out', tmp_path / 'out')
    assert '3 of 3 inputs failed' in message
    assert 'but there are only 1 class names' in message
    assert read(tmp_path / 'out' / PREDICTIONS)['images'] == []


def test_interrupted(network, photos, tmp_path, monkeypatch):
    """What was found so far is written."""
    plain = inference._plain
    calls = []

    def stop(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(*args)

    monkeypatch.setattr(inference, '_plain', stop)
    content = read(infer(*network, [photos], tmp_path / 'out', pictures=False))
    assert len(content['images']) == 2


def test_ids_of_annotations(network, photos, shapes, tmp_path):
    from pycocotools.coco import COCO

    content = json.loads((shapes / 'annotations/instances_val2017.json').read_text())
    for i, category in enumerate(content['categories'][:3]):
        category['name'] = CLASSES[2 - i]
    for image in content['images']:
        image['id'] += 100
    for annotation in content['annotations']:
        annotation['image_id'] += 100
    path = tmp_path / 'truth.json'
    path.write_text(json.dumps(content))
    found = read(
        infer(*network, [photos], tmp_path / 'out', annotations=path, pictures=False)
    )
    truth = COCO(str(path))
    COCO.loadRes(truth, found['annotations'])  # checks that the images are there
    assert truth.getCatIds(catNms=['wasp']) == [found['categories'][2]['id']]
    with pytest.raises(ValueError, match="lacks category 'ant'"):
        content['categories'][2]['name'] = 'fly'
        path.write_text(json.dumps(content))
        infer(*network, [photos], tmp_path / 'new', annotations=path)
    assert not (tmp_path / 'new').exists()


def test_classifier(tmp_path, photos):
    pytest.importorskip('mmpretrain')
    cfg = classifier()
    cfg['data_preprocessor'] = cfg['model'].pop('data_preprocessor')
    cfg['test_dataloader']['dataset'].update(
        type='CustomDataset', metainfo=dict(classes=('a', 'b', 'c', 'd'))
    )
    config, checkpoint = save(tmp_path, 'narrow', cfg)
    content = read(infer(config, checkpoint, [photos], tmp_path / 'out', batch_size=2))
    assert len(content['annotations']) == 4 * len(content['images']) == 12
    assert sum(x['score'] for x in content['annotations']) == pytest.approx(3)
    drawn = cv2.imread(str(tmp_path / 'out' / sorted(photos.iterdir())[0].name))
    assert min(drawn.shape[:2]) == 224  # room for the names
    # By hand: resized, normalised as the config says
    image = cv2.imread(content['images'][0]['file_name'])
    x = torch.from_numpy(cv2.resize(image, (40, 32)).astype(np.float32))
    x = ((x - 127.5) / 50).permute(2, 0, 1)[None]
    model = open_inferencer(config, checkpoint, 'cpu').model
    scores = model.head.fc(model.extract_feat(x)[-1])[0].softmax(0)
    best = content['annotations'][0]
    assert best['score'] == pytest.approx(float(scores.max()), abs=1e-5)
    assert best['category_id'] == int(scores.argmax()) + 1


# -- what is refused -----------------------------------------------------------


@pytest.fixture
def tool(capsys):
    main = runpy.run_path(str(TOOL))['main']

    def run(*arguments):
        with pytest.raises(SystemExit) as error:
            main(list(map(str, arguments)))
        message = str(error.value.code)
        assert message.startswith('error: ') and '\n' not in message
        return message

    return run


def test_inputs(photos, clip, tmp_path):
    found = find_sources([photos, clip, 'camera:2'])
    assert [x.is_stream for x in found] == [False] * 3 + [True] * 2
    assert found[-1].camera == 2
    (tmp_path / 'notes.txt').touch()
    for given, error, message in [
        (tmp_path / 'none.jpg', FileNotFoundError, 'none.jpg'),
        (tmp_path / '*.jpg', FileNotFoundError, r'no file matches .*\*.jpg'),
        (tmp_path, FileNotFoundError, 'no image in'),
        (tmp_path / 'notes.txt', ValueError, 'neither an image .* nor a video'),
        ('camera:front', ValueError, 'camera:front is not a camera; write camera:N'),
    ]:
        with pytest.raises(error, match=message):
            find_sources([given])


def test_what_can_be_read_is_written(network, photos, tmp_path, tool):
    broken = tmp_path / 'broken.png'
    broken.write_text('no image')
    out = tmp_path / 'out'
    message = tool(*network, broken, photos, '--out', out, '--no-pictures')
    assert '1 of 4 inputs failed' in message and str(broken) in message
    assert len(read(out / PREDICTIONS)['images']) == 3


@pytest.mark.parametrize(
    'option, message',
    [
        (['--batch-size', '0'], 'batch_size=0'),
        (['--frames', '0'], 'frames=0'),
        (['--score-thr', '2'], 'score_thr=2'),
        (['--device', 'abacus'], 'abacus'),
    ],
)
def test_arguments(network, photos, tmp_path, tool, option, message):
    out = tmp_path / 'out'
    assert message in tool(*network, photos, '--out', out, *option)
    assert not out.exists()


def test_folder_that_is_not_empty(network, photos, tool):
    """So nothing is overwritten, the inputs least of all."""
    assert 'is not an empty folder' in tool(*network, photos, '--out', photos)
    assert len(list(photos.iterdir())) == 3


def test_checkpoint_of_another_network(network, photos, tmp_path, tool):
    config, checkpoint = network
    state = torch.load(checkpoint)
    backbone = {k: v for k, v in state.items() if k.startswith('backbone.')}
    other = tmp_path / 'backbone.pth'
    torch.save(backbone, other)
    lacking = len(state) - len(backbone)
    message = tool(config, other, photos, '--out', tmp_path / 'out')
    heads = sum(k.startswith('roi_head.') for k in state)
    for part in (
        f"{lacking} of the network's {len(state)} keys are missing",
        f'{heads} of {heads} in roi_head',
        f"0 of the checkpoint's {len(backbone)} keys are not in the network",
        str(other),
        '--force',
    ):
        assert part in message
    infer(config, other, [photos], tmp_path / 'out', pictures=False, force=True)
    # And tools/test.py, before it does anything
    check = runpy.run_path(str(ROOT / 'tools' / 'test.py'))['check']
    with pytest.raises(SystemExit, match=f'{lacking} of the network'):
        check([str(config), str(other)], force=False)
    check([str(config), str(other)], force=True)
    check([str(config), str(checkpoint)], force=False)
    # A change on the command line counts
    wide = ['--cfg-options', 'model.backbone.base_channels=16']
    with pytest.raises(SystemExit, match='backbone'):
        check([str(config), str(checkpoint), *wide], force=False)


def test_fit():
    """Most keys of a part, by name and shape; a wrapper's prefix does not count."""
    model = torch.nn.ModuleDict(
        dict(body=torch.nn.Linear(2, 3), head=torch.nn.Linear(3, 4))
    )
    state = model.state_dict()
    check_fit(model, state, 'a.py', 'b.pth')
    wrapped = {f'module.{k}': v for k, v in state.items()}
    check_fit(model, strip_module(wrapped), 'a.py', 'b.pth')
    check_fit(model, {k: v for k, v in state.items() if k != 'head.bias'}, 'a', 'b')
    state['head.weight'] = torch.zeros(5, 3)
    check_fit(model, state, 'a.py', 'b.pth')  # one of two
    state['head.bias'] = torch.zeros(5)
    state['tail.weight'] = torch.zeros(1)
    expected = (
        r'b.pth comes from a different network than a.py: 2 of the network.s 4 keys '
        r'.* such as head.weight \(2 of 2 in head\), and 1 of the checkpoint.s 5 keys'
    )
    with pytest.raises(ValueError, match=expected):
        check_fit(model, state, 'a.py', 'b.pth')


def test_attentions_under_a_config_without(network, tmp_path):
    """Such a network runs, but it is not the one of the checkpoint."""
    config, checkpoint = network
    cfg = Config.fromfile(config)
    plain = tmp_path / 'plain.py'
    del cfg.model.backbone['layer_attention']
    cfg.model.backbone.type = 'ResNet'
    cfg.dump(plain)
    check = runpy.run_path(str(ROOT / 'tools' / 'test.py'))['check']
    with pytest.raises(SystemExit) as error:
        check([str(plain), str(checkpoint)], force=False)
    assert 'such as backbone.layer1.0.layer_attn; without them' in str(error.value)
    assert '\n' not in str(error.value)
    check([str(plain), str(checkpoint)], force=True)
    # What is pruned whole is missed by nobody
    state = torch.load(checkpoint)
    for key in state:
        if key.endswith('layer_attn.state'):
            state[key].fill_(encode(AttentionState.PRUNED))
    torch.save(state, tmp_path / 'pruned.pth')
    check([str(plain), str(tmp_path / 'pruned.pth')], force=False)


def test_slim_checkpoint_with_the_whole_network(network, tmp_path):
    """It lacks few keys, but an attention would be a random one."""
    config, checkpoint = network
    state = torch.load(checkpoint)
    name = 'backbone.layer1.1.layer_attn'
    slim = {k: v for k, v in state.items() if not k.startswith(name)}
    torch.save(slim, tmp_path / 'slim.pth')
    with pytest.raises(
        ValueError, match=rf'\d+ of \d+ in {name}\).* use a slim checkpoint'
    ):
        open_inferencer(config, tmp_path / 'slim.pth', 'cpu')


def test_classes_of_the_data():
    """mmdet's own configs name the type of the data alone."""
    pytest.importorskip('mmdet')
    init_default_scope('mmdet')
    names = inference._classes(
        dict(type='RepeatDataset', dataset=dict(type='CocoDataset'))
    )
    assert len(names) == 80 and names[0] == 'person'
    with pytest.raises(ValueError, match='has class names'):
        inference._classes(dict(type='BaseDetDataset'))


def test_config_of_no_detector(tmp_path, photos):
    plain = dict(classifier(), default_scope='mmengine')
    config = tmp_path / 'plain.py'
    Config(plain).dump(config)
    torch.save(dict(a=torch.zeros(1)), tmp_path / 'a.pth')
    with pytest.raises(ValueError, match="default_scope='mmengine'"):
        infer(config, tmp_path / 'a.pth', [photos], tmp_path / 'out')
