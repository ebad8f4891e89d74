"""The layout: dependencies point one way, and a file has one purpose that fits into 400 lines."""

import ast
from collections import Counter
from pathlib import Path

import pytest

import timm_bilinear

PACKAGE = Path(timm_bilinear.__file__).parent
# A part imports itself and what stands to its left.
ORDER = ('_compat', 'ops', 'layers', 'models', 'hub data', 'tools', 'cli_options', 'cli')
RANK = {part: rank for rank, parts in enumerate(ORDER) for part in parts.split()}
FILES = sorted(p for p in PACKAGE.rglob('*.py') if p.parent != PACKAGE or p.stem in RANK)


def imported_parts(path):
    """Parts of the package that a file imports, at any place in it."""
    parents = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = parents[: len(parents) - node.level + 1]
            names = [*base, *(node.module.split('.') if node.module else ())]
            yield from names[:1] if names else [alias.name for alias in node.names]


@pytest.mark.parametrize('path', FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_dependencies_point_one_way(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix('.py')
    for other in imported_parts(path):
        assert other == part or RANK[other] < RANK[part], f'{part} must not import {other}'


@pytest.mark.parametrize('folder', ['timm_bilinear', 'hub', 'tests'])
def test_files_are_short(folder):
    long = {p.name: n for p in (PACKAGE.parent / folder).rglob('*.py') if (n := len(p.read_text().splitlines())) > 400}
    assert not long


def test_names_of_tests():
    """pytest imports the files of tests by their names alone."""
    names = Counter(p.name for p in (PACKAGE.parent / 'tests').rglob('*.py') if p.name != 'conftest.py')
    assert [name for name, count in names.items() if count > 1] == []
