import torch

from timm_bilinear import benchmark
from timm_bilinear.ops import bilinear_classify, fold_symmetric_weight


def test_article_head_is_the_same_function():
    """Contestants must compute the same thing."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 12, 5, 4).relu(), torch.randn(7, 144), torch.randn(7)
    expected = benchmark.article_head(x, weight, bias)
    torch.testing.assert_close(
        bilinear_classify(x, None, fold_symmetric_weight(weight), bias), expected, rtol=0, atol=1e-4
    )


def test_peak_memory():
    def run():
        x = torch.empty(1 << 20)  # 4 MiB
        y = x + 1
        del x
        y = y + 1

    assert 8 << 20 <= benchmark._peak_memory(run) < 9 << 20


def test_seconds_takes_contestants_in_turn():
    calls = []
    benchmark._seconds({'a': lambda: calls.append('a'), 'b': lambda: calls.append('b')}, repeats=2)
    assert ''.join(calls) == 'abababab'
