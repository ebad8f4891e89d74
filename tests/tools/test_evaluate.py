"""Evaluation of models whose every answer is known, on files as users have them."""

import math

import numpy as np
import pytest
import timm
import torch
from evaluation_cases import CENTRES, FILES, LEVELS, NAMES, Nearest, expected, read_csv, run, write
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from timm_bilinear import save_model
from timm_bilinear.data.folder import create_split
from timm_bilinear.data.loader import create_loader
from timm_bilinear.tools.evaluate import evaluate_dataset, evaluate_loader, format_metrics
from timm_bilinear.tools.evaluation_files import ResultFolder


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data')
    write(folder / 'train')
    write(folder / 'test')
    return folder


def test_metrics_are_those_of_the_answers(data):
    sklearn = pytest.importorskip('sklearn.metrics')
    metrics = run(Nearest(), data, batch_size=4)
    _, targets, guesses, probs = map(np.array, zip(*expected()))
    assert metrics['images'] == len(targets) == 13 and metrics['split'] == 'test'
    assert metrics['top1'] == pytest.approx(100 * (targets == guesses).mean())
    assert metrics['top1_low'] < metrics['top1'] < metrics['top1_high']
    recall = sklearn.recall_score(targets, guesses, labels=sorted(set(targets.tolist())), average='macro')
    assert metrics['mean_per_class'] == pytest.approx(100 * recall)
    assert metrics['loss'] == pytest.approx(sklearn.log_loss(targets, probs, labels=range(7)), rel=1e-4)
    top5 = sklearn.top_k_accuracy_score(targets, probs, k=5, labels=range(7))
    assert metrics['top5'] == pytest.approx(100 * top5)
    assert metrics['classes_without_images'] == ['eel', 'gnu']
    assert any('5 of 7 classes' in note for note in metrics['notes'])
    assert metrics['most_confused'] == [
        dict(classes=['cat, wild', 'dog'], taken_for=[0, 2]),
        dict(classes=['ant', 'bee'], taken_for=[1, 0]),
        dict(classes=['bee', 'cat, wild'], taken_for=[1, 0]),
    ]
    assert f'top-1 {metrics["top1"]:.2f} %' in format_metrics(metrics)


@pytest.mark.parametrize('batch_size', [1, 5, 100])
def test_batches_change_nothing(data, batch_size):
    one, other = run(Nearest(), data, batch_size=13), run(Nearest(), data, batch_size=batch_size)
    assert one == {k: pytest.approx(v) if isinstance(v, float) else v for k, v in other.items()}


def test_one_image_and_one_class(tmp_path):
    metrics = run(Nearest(), write(tmp_path / 'data', {'bee': [55]}), output=tmp_path / 'out')
    assert (metrics['images'], metrics['top1'], metrics['top1_high']) == (1, 100, 100)
    assert metrics['top1_low'] == pytest.approx(20.65, abs=0.01)
    metrics = run(Nearest([10], ['bee']), tmp_path / 'data', output=tmp_path / 'out')
    assert (metrics['top1'], metrics['loss']) == (100, 0) and 'top5' not in metrics


def test_model_without_names_takes_the_folders_in_order(tmp_path):
    levels = {'a': [20, 21], 'b': [55], 'c': [90]}
    folder = write(tmp_path / 'data', levels)
    metrics = run(Nearest(CENTRES[:3], None), folder)
    assert metrics['top1'] == 100 and any('no class names' in note for note in metrics['notes'])
    with pytest.raises(ValueError, match='3 classes and the model 7 without names'):
        run(Nearest(CENTRES, None), folder)
    metrics = run(Nearest(CENTRES[:3], None), folder, label_names=['c', 'b', 'a'])
    assert metrics['top1'] == 25


def test_numbers_may_be_names(tmp_path):
    folder = write(tmp_path / 'data', {'1': [20], '2': [55], '0': [90]})
    assert run(Nearest(CENTRES[:3], ['1', '2', '0']), folder)['top1'] == 100
    # timm reads a mapping too
    assert run(Nearest(CENTRES[:3], {0: '1', 1: '2', 2: '0'}), folder)['top1'] == 100


def test_class_unknown_to_the_model(data, tmp_path):
    folder = write(tmp_path / 'data', {'ant': [20], 'zebra': [30]})
    with pytest.raises(ValueError, match='zebra'):
        run(Nearest(), folder, output=tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_nan_is_said_by_the_images_name(data, tmp_path):
    with pytest.raises(ValueError, match=r"probabilities for '[^']*dog/1\.png' are not finite"):
        run(Nearest(poison=92), data, batch_size=4, output=tmp_path / 'a' / 'b')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    'wrong, message',
    [
        (dict(tta='mirror'), "'tta' must be"),
        (dict(amp='half'), "'amp' must be"),
        (dict(batch_size=0), "'batch_size' must be"),
        (dict(worst=-1), "'worst' must be"),
        (dict(pairs=1.5), "'pairs' must be"),
        (dict(split='tset'), 'tset'),
        (dict(split='a/b'), "'split' must be"),
        (dict(split='..'), "'split' must be"),
        (dict(split=''), "'split' must be"),
        (dict(split=None), "'split' must be"),
        (dict(split='/test'), "'split' must be"),
        (dict(split='a\\b'), "'split' must be"),
        (dict(data=''), "'data' is empty"),
        (dict(data=None), "'data' must be"),
        (dict(data=3), "'data' must be"),
        (dict(output=''), "'output' is empty"),
        (dict(root=''), "'root' is empty"),
        (dict(class_map=''), "'class_map' is empty"),
        (dict(batch_size=2.0), "'batch_size' must be a whole number"),
        (dict(workers=True), "'workers' must be a whole number"),
        (dict(device=3.4), "'device'"),
        (dict(label_names=7), "'label_names' must be a list"),
        (dict(label_names=['a']), "'label_names' must name 7"),
        (dict(label_names={7: 'a'}), "'label_names' must name 7"),
        (dict(label_names='gone.txt'), "The label names 'gone.txt'"),
        (dict(model='no_such_model'), 'no_such_model'),
        (dict(data='nowhere'), 'nowhere'),
    ],
)
def test_wrong_arguments_are_named(data, tmp_path, wrong, message):
    arguments = dict(dict(model=Nearest(), data=data, output=tmp_path / 'out'), **wrong)
    with pytest.raises((ValueError, OSError, TypeError), match=message) as caught:
        run(arguments.pop('model'), arguments.pop('data'), **arguments)
    assert '\n' not in str(caught.value)
    assert not (tmp_path / 'out').exists()


def test_model_without_classifier(data):
    model = Nearest()
    model.num_classes = 0
    with pytest.raises(ValueError, match='no classifier'):
        run(model, data)


def test_bad_images(tmp_path):
    folder = write(tmp_path / 'data', {'ant': [20, 21], 'bee': [55]})
    (folder / 'ant' / 'bad.png').write_bytes(b'no picture')
    with pytest.raises(ValueError, match=r'bad\.png'):
        run(Nearest(), folder)
    metrics = run(Nearest(), folder, skip_bad=True)
    assert metrics['images'] == 3 and any('bad.png' in note for note in metrics['notes'])


def test_tta_is_the_mean_of_the_views(data):
    class Sided(Nearest):
        """Looks at the left half of an image only."""

        def forward(self, x):
            return super().forward(x[..., : x.shape[-1] // 2])

    folder = data.parent / 'halves'
    (folder / 'ant').mkdir(parents=True, exist_ok=True)
    image = Image.new('RGB', (16, 16), (20,) * 3)
    image.paste((160,) * 3, (8, 0, 16, 16))
    image.save(folder / 'ant' / '0.png')
    probs = []
    for level in (20, 160):
        logits = -((level - np.array(CENTRES, float)) ** 2) / 300
        probs.append(np.exp(logits) / np.exp(logits).sum())
    assert run(Sided(), folder)['loss'] == pytest.approx(-math.log(probs[0][0]), rel=1e-3)
    assert run(Sided(), folder, tta='flip')['loss'] == pytest.approx(-math.log(np.mean(probs, 0)[0]), rel=1e-3)
    assert run(Nearest(), data, tta='crops')['top1'] == run(Nearest(), data)['top1']


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A saved network of timm and ours, whose classes are those of the data."""
    torch.manual_seed(0)
    model = timm.create_model('bcnn', backbone_a='test_resnet', num_classes=len(NAMES), img_size=64)
    folder = tmp_path_factory.mktemp('model')
    save_model(model, folder, NAMES)
    return folder


def test_a_saved_model_against_timms_own_way(trained, data, tmp_path):
    """Accuracy and losses of timm's transform and the model, image by image in float32."""
    model = timm.create_model(f'local-dir:{trained}', pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model))
    losses = {}
    for path in sorted((data / 'test').rglob('*.png')):
        with torch.inference_mode():
            logits = model(transform(Image.open(path).convert('RGB'))[None])
        losses[f'{path.parent.name}/{path.name}'] = -logits.log_softmax(1)[0, NAMES.index(path.parent.name)].item()
    metrics = run(trained, data, output=tmp_path / 'out', amp='float32')
    rows = read_csv(tmp_path / 'out' / 'predictions.csv')
    assert len(rows) == len(losses)
    for row in rows:
        assert float(row['loss']) == pytest.approx(losses['/'.join(row['image'].split('/')[-2:])], abs=1e-4)
    assert metrics['loss'] == pytest.approx(np.mean(list(losses.values())), abs=1e-4)
    assert (metrics['model'], metrics['amp']) == (str(trained), 'float32')


def test_validation_is_the_same_loop(trained, data):
    model = timm.create_model(f'local-dir:{trained}', pretrained=True)
    split = create_split(data, 'test', class_names=NAMES).splits['test']
    device = torch.device('cpu')
    loader = create_loader(split, resolve_model_data_config(model), 5, workers=0, device=device)
    model.train()
    result = evaluate_loader(model, loader, device, progress=False)
    assert not model.training
    metrics = run(model, data, amp='float32')
    assert result == {k: pytest.approx(metrics[k]) for k in ('loss', 'top1', 'top5', 'images')}


def test_validation_adds_up_over_processes(trained, data):
    model = timm.create_model(f'local-dir:{trained}', pretrained=True)
    split = create_split(data, 'test', class_names=NAMES).splits['test']
    config, device = resolve_model_data_config(model), torch.device('cpu')
    whole = evaluate_loader(model, create_loader(split, config, 4, workers=0, device=device), device, progress=False)
    sums = []
    for rank in range(2):
        loader = create_loader(split, config, 4, workers=0, device=device, rank=rank, world_size=2)
        with pytest.raises(InterruptedError):  # each stops where it would wait for the others
            evaluate_loader(model, loader, device, progress=False, reduce=lambda s: sums.append(s) or _stop())
    both = {k: sums[0][k] + sums[1][k] for k in sums[0]}
    assert both['images'] == 13
    reduced = evaluate_loader(model, [], device, progress=False, reduce=lambda _: both)
    assert reduced == {k: pytest.approx(v) for k, v in whole.items()}
    with pytest.raises(ValueError, match='no images'):
        evaluate_loader(model, [], device, progress=False)


def _stop():
    raise InterruptedError


def test_validation_of_nan_is_nan():
    loader = [(torch.full((2, 3, 16, 16), 92 / 255), torch.tensor([2, 2]))]
    result = evaluate_loader(Nearest(poison=92), loader, torch.device('cpu'), progress=False)
    assert math.isnan(result['loss']) and result['top1'] == 0


def test_named_datasets(data, tmp_path):
    """timm's own way to a folder: by the name of the reader, with its root."""
    model = Nearest([CENTRES[i] for i in (0, 1, 2, 3, 5)], sorted(LEVELS))
    named, folder = run(model, 'torch/image_folder', root=data, output=tmp_path), run(model, data)
    assert named['images'] == 13 and named['top1'] == folder['top1'] and named['loss'] == folder['loss']
    rows = read_csv(tmp_path / 'predictions.csv')
    assert [row['target'] for row in rows] == [NAMES[target] for _, target, _, _ in expected()]
    sheet = np.asarray(Image.open(tmp_path / 'worst_images.png'))
    assert all(((sheet == level).all(2)).sum() > 5000 for level in LEVELS['dog'])
    # classes go by their names, as those of a folder do
    assert run(Nearest(), 'torch/image_folder', root=data)['loss'] == run(Nearest(), data)['loss']


def test_streams_have_no_names_for_images(tmp_path):
    """A dataset without indices is measured; its images cannot be had again."""

    class Images(torch.utils.data.IterableDataset):
        transform = None

        def __len__(self):
            return len(levels)

        def __iter__(self):
            for _, target, level in levels:
                image = Image.new('RGB', (24, 18), (level,) * 3)
                yield (image if self.transform is None else self.transform(image)), target

    levels = [(name, NAMES.index(name), level) for name in sorted(LEVELS) for level in LEVELS[name]]
    result = evaluate_dataset(Nearest(), Images(), NAMES, batch_size=4, workers=0, progress=False)
    assert result.images.predictions.tolist() == [guess for _, _, guess, _ in expected()]
    with ResultFolder(tmp_path / 'out') as folder:
        folder.write(result, 4, 2)
    assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == FILES
    assert read_csv(tmp_path / 'out' / 'predictions.csv')[3]['image'] == '#3'


def test_class_map(tmp_path):
    """As timm's validation script takes it: a folder per line, in the order of the logits."""
    folder = write(tmp_path / 'data', {'n1': [55], 'n2': [20], 'n3': [90]})
    (tmp_path / 'map.txt').write_text('n2\nn1\nn3\n')
    assert run(Nearest(CENTRES[:3], None), folder, class_map=tmp_path / 'map.txt')['top1'] == 100
    assert run(Nearest(), folder, class_map={'n2': 0, 'n1': 1, 'n3': 2})['top1'] == 100
