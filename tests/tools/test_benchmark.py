import time

import pytest
import torch

from timm_bilinear.cli import main
from timm_bilinear.layers import list_poolings
from timm_bilinear.layers.pooling import most_streams
from timm_bilinear.ops import bilinear_classify, fold_symmetric_weight
from timm_bilinear.tools import benchmark, benchmark_head, measure

CPU = torch.device('cpu')


def test_article_head_is_the_same_function():
    """Contestants must compute the same thing."""
    x, weight, bias = torch.randn(2, 12, 5, 4).relu(), torch.randn(7, 144), torch.randn(7)
    expected = benchmark.article_head(x, None, weight, bias)
    torch.testing.assert_close(
        bilinear_classify(x, None, fold_symmetric_weight(weight), bias), expected, rtol=0, atol=1e-4
    )
    y, weight = torch.randn(2, 6, 5, 4), torch.randn(7, 72)
    expected = benchmark.article_head(x, y, weight, bias)
    torch.testing.assert_close(bilinear_classify(x, y, weight, bias), expected, rtol=0, atol=1e-4)


def test_peak_memory():
    def run():
        x = torch.empty(1 << 20)  # 4 MiB
        y = x + 1
        del x
        y = y + 1

    assert 8 << 20 <= measure.peak_memory(run, CPU) < 9 << 20


def test_seconds_takes_contestants_in_turn():
    calls = []
    measure.measure_seconds({'a': lambda: calls.append('a'), 'b': lambda: calls.append('b')}, repeats=2, device=CPU)
    assert ''.join(calls) == 'ababababab'


@pytest.mark.parametrize('channels_b', [None, 6])
def test_table(monkeypatch, tmp_path, channels_b):
    monkeypatch.setattr(benchmark_head, 'CPU_CASES', [benchmark.Case(2, 8, channels_b, 4, 3)])
    grid = [benchmark.Case(2, 8, channels_b, 4, 3, shared=True), benchmark.Case(1, 8, channels_b, 4, 3, threads=1)]
    monkeypatch.setattr(benchmark_head, 'CPU_GRID', grid)
    path = tmp_path / 'new' / 'table.md'
    before = torch.get_num_threads()
    main(['benchmark', 'head', '--repeats', '1', '--output', str(path)])
    assert torch.get_num_threads() == before
    rows = [line.strip('| ').split(' | ') for line in path.read_text().splitlines() if line.startswith('| float32')]
    assert [row[1] for row in rows[:3]] == ['forward', 'forward + backward', 'peak memory (without gradients)']
    assert all(float(row[-1]) > 0 and row[-3].endswith(' x') for row in rows[:2])
    assert [row[0] for row in rows[3:]] == [*map(str, grid)] and 'shared' in rows[3][0] and '1 thread' in rows[4][0]
    assert all(float(row[i].removesuffix(' x')) > 0 for row in rows[3:] for i in (4, 8))
    slower = sum(float(row[i].removesuffix(' x')) < 1 for row in rows[3:] for i in (4, 8))
    assert f'Slower than the better of the two in {slower} of 4 figures' in path.read_text()
    assert f'| 8 | 4 | {slower} |' in path.read_text()


def test_what_the_allocator_does_not_see_counts_too():
    a = torch.randn(1, 145, 4, 4)
    weight = torch.randn(200, 145 * 146 // 2, requires_grad=True)  # 8 MB
    assert measure.peak_memory(lambda: torch.autograd.grad(bilinear_classify(a, None, weight).sum(), weight), CPU) > 8e6


def test_rounds_end_with_the_budget():
    calls = []
    measure.measure_seconds({'a': lambda: calls.append(1)}, repeats=10**6, device=CPU, budget=0.05)
    assert 6 <= len(calls) < 10**6
    calls.clear()
    measure.measure_seconds({'a': lambda: calls.append(time.sleep(0.1))}, repeats=10, device=CPU, budget=0.05)
    assert len(calls) == 4


def test_every_pooling_is_measured(monkeypatch, tmp_path):
    cases = [benchmark.Case(2, 8, channels_b, 4, 3) for channels_b in (None, 6)]
    monkeypatch.setattr(benchmark, 'POOLING_CASES', cases)
    monkeypatch.setattr(torch, 'compile', lambda head: head)
    main(['benchmark', 'poolings', '--repeats', '1', '--output', str(tmp_path / 'table.md')])
    lines = (tmp_path / 'table.md').read_text().splitlines()
    rows = [line.strip('| ').split(' | ') for line in lines if line.startswith('| float32')]
    others = ['average pooling', "article's head"]
    one = [row for row in rows if row[0] == str(cases[0])]
    assert [row[1] for row in one] == others + list_poolings()
    two = [row[1] for row in rows if row[0] == str(cases[1])]
    assert two == others + [name for name in list_poolings() if most_streams(name) > 1]
    assert all(float(row[4].split()[0]) > 0 and row[-1].endswith('MiB') for row in rows)
    heads = benchmark.pooling_heads(cases[0])
    assert {name: f'{head.num_features:,}' for name, head in heads.items()} == {row[1]: row[2] for row in one}


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
@pytest.mark.parametrize('what', ['head', 'model', 'poolings'])
def test_no_gpu(what):
    with pytest.raises(SystemExit, match=r"^timm-bilinear: error: No GPU for 'cuda'"):
        main(['benchmark', what, '--device', 'cuda'])
