"""Private names of other libraries: they are there, and no other file of the package uses one."""

import ast
from pathlib import Path

import pytest
import torch

import timm_bilinear
from timm_bilinear import _compat

PACKAGE = Path(timm_bilinear.__file__).parent
LIBRARIES = {'timm', 'torch', 'torchvision', 'huggingface_hub', 'safetensors', 'triton'}
# Attributes of timm's models that its own functions read and write, and that a model of ours has to have.
OF_MODELS = {'_traits', '_model_args'}


def _is_private(name: str) -> bool:
    return name.startswith('_') and not name.startswith('__')


def private_names(path: Path):
    """(line, name) of private names of other libraries that a file imports or reads as attributes."""
    tree = ast.parse(path.read_text())
    imported = {}  # local name -> library
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                library = alias.name.split('.')[0]
                if library in LIBRARIES:
                    imported[(alias.asname or alias.name).split('.')[0]] = library
                    if any(map(_is_private, alias.name.split('.'))):
                        yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module.split('.')[0] in LIBRARIES:
            for alias in node.names:
                imported[alias.asname or alias.name] = node.module
                if any(map(_is_private, [*node.module.split('.'), alias.name])):
                    yield node.lineno, f'{node.module}.{alias.name}'
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr) and node.attr not in OF_MODELS:
            root = node.value
            while isinstance(root, ast.Attribute | ast.Call | ast.Subscript):
                root = root.func if isinstance(root, ast.Call) else root.value
            if isinstance(root, ast.Name) and root.id in imported:
                yield node.lineno, ast.unparse(node)


@pytest.mark.parametrize('path', sorted(PACKAGE.rglob('*.py')), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_private_names_are_in_compat_alone(path):
    if path.name != '_compat.py':
        assert list(private_names(path)) == []


def test_finds_private_names(tmp_path):
    path = tmp_path / 'x.py'
    path.write_text(
        'import torch\nimport timm.models._hub\nfrom timm import models as m\nfrom torch._dynamo import reset\n'
        'm._hub.hf_split("a")\ntorch.ops.mkldnn._linear(1)\nself._own = torch.nn.Linear(2, 3)._parameters\n'
    )
    assert sorted(line for line, _ in private_names(path)) == [2, 4, 5, 6, 7]


def test_compat_names_are_there():
    assert all(hasattr(_compat, name) for name in _compat.__all__)
    assert _compat.hf_split('owner/name@v1') == ('owner/name', 'v1')
    assert list(_compat.feature_take_indices(5, 2)[0]) == [3, 4]
    assert isinstance(_compat.mkldnn_has_bfloat16(), bool)
    if torch.backends.mkldnn.is_available():
        x, weight = torch.randn(3, 4), torch.randn(2, 4)
        torch.testing.assert_close(_compat.mkldnn_linear(x, weight, None, 'none', [], ''), x @ weight.t())
