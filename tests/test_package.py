"""The package as users get it: what it needs, and the wheel, built and installed alone."""

import ast
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Where the name of an import is not that of its distribution.
DISTRIBUTIONS = {'PIL': 'pillow', 'yaml': 'pyyaml', 'huggingface_hub': 'huggingface-hub'}
# Used where it is there: triton comes with torch for GPUs, scipy is the 'cars' extra.
OPTIONAL = {'triton', 'scipy', 'onnx', 'onnxruntime', 'faiss', 'gradio'}

_SMOKE = """
import sys
from pathlib import Path
import timm, timm_bilinear, torch
from timm_bilinear import BilinearCNN, push_to_hub
from timm_bilinear.layers import BilinearHead, create_pooling
from timm_bilinear.finetune import Stage, finetune
from timm_bilinear.ops import bilinear_pool

assert Path(timm_bilinear.__file__).is_relative_to(sys.prefix), timm_bilinear.__file__
assert timm_bilinear.finetune.finetune is finetune and timm_bilinear.layers.BilinearHead is BilinearHead
model = timm.create_model('bcnn', backbone_a='test_resnet', num_classes=3).eval()
assert isinstance(model, BilinearCNN) and len(timm.list_models('bcnn*')) > 10
images = torch.randn(2, 3, 64, 64)
timm_bilinear.save_model(model, 'saved')
assert torch.equal(timm.create_model('local-dir:saved', pretrained=True).eval()(images), model(images))
"""


def run(*command, **kwargs):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def imports(folder):
    """Top-level names of what the files of a folder import."""
    for path in folder.rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            yield from (name.split('.')[0] for name in names)


def test_dependencies_are_what_is_imported():
    text = (ROOT / 'pyproject.toml').read_text()
    listed = re.search(r'^dependencies = \[(.*?)^\]', text, re.MULTILINE | re.DOTALL)[1]
    named = set(re.findall(r"'([\w-]+)", listed))
    used = set(imports(ROOT / 'timm_bilinear')) - set(sys.stdlib_module_names) - OPTIONAL
    assert {DISTRIBUTIONS.get(name, name) for name in used} <= named


@pytest.fixture(scope='module')
def dist(tmp_path_factory):
    """What `python -m build` makes of the checkout."""
    source = tmp_path_factory.mktemp('source')
    for name in ('pyproject.toml', 'README.md', 'LICENSE', 'timm_bilinear'):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    run(sys.executable, '-m', 'build', source)
    return source / 'dist'


def test_build_is_fit_for_an_index(dist):
    files = sorted(path.name for path in dist.iterdir())
    assert len(files) == 2 and files[0].endswith('.whl') and files[1].endswith('.tar.gz')
    assert run(sys.executable, '-m', 'twine', 'check', '--strict', *dist.iterdir()).count('PASSED') == 2


def test_wheel_holds_the_package_alone(dist):
    with zipfile.ZipFile(next(dist.glob('*.whl'))) as wheel:
        names = wheel.namelist()
        metadata = wheel.read(next(n for n in names if n.endswith('/METADATA'))).decode()
    assert {name.split('/')[0].split('-')[0] for name in names} == {'timm_bilinear'}
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / 'timm_bilinear').rglob('*.py')}
    assert modules | {'timm_bilinear/py.typed'} <= set(names)
    assert 'Classifier: Typing :: Typed' in metadata and 'Project-URL: Paper' in metadata


def test_wheel_alone(dist, tmp_path):
    # With this environment's libraries, but nothing of the checkout, nor its editable installation.
    venv = tmp_path / 'venv'
    run(sys.executable, '-m', 'venv', venv)
    python = venv / 'bin' / 'python'
    run(python, '-m', 'pip', 'install', '-q', '--no-deps', '--no-index', next(dist.glob('*.whl')))
    paths = {sysconfig.get_path(name) for name in ('purelib', 'platlib')}
    packages = run(python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))').strip()
    Path(packages, 'libraries.pth').write_text('\n'.join(paths))
    (tmp_path / 'work').mkdir()
    run(python, '-c', _SMOKE, cwd=tmp_path / 'work')
    assert 'finetune' in run(venv / 'bin' / 'timm-bilinear', '--help', cwd=tmp_path / 'work')
