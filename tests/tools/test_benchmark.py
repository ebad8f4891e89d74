import pytest
import torch

from timm_bilinear.cli import main
from timm_bilinear.layers import list_poolings
from timm_bilinear.layers.pooling import most_streams
from timm_bilinear.ops import bilinear_classify, fold_symmetric_weight
from timm_bilinear.tools import benchmark, measure

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
    monkeypatch.setattr(benchmark, 'CPU_CASES', [benchmark.Case(2, 8, channels_b, 4, 3)])
    path = tmp_path / 'new' / 'table.md'
    main(['benchmark', 'head', '--repeats', '1', '--output', str(path)])
    rows = [line.strip('| ').split(' | ') for line in path.read_text().splitlines() if line.startswith('| float32')]
    assert [row[1] for row in rows] == ['forward', 'forward + backward', 'peak memory (without gradients)']
    assert all(float(row[-1]) > 0 and row[-3].endswith(' x') for row in rows[:2])


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
