import gc
import os
import sys
from subprocess import CompletedProcess

import pytest
import torch
from huggingface_hub import constants

# Without a GPU, kernels run in Triton's interpreter; it has to know before it is imported, which inductor does too.
if not torch.cuda.is_available():
    os.environ['TRITON_INTERPRET'] = '1'


@pytest.fixture(autouse=True)
def offline_and_seeded(monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)  # the client's own switch: no test reaches for the network
    torch.manual_seed(0)


@pytest.fixture
def clean_up():
    """For tests of whole models and compilers, whose memory and caches would add up."""
    yield
    torch._dynamo.reset()
    gc.collect()


@pytest.fixture
def call_main(monkeypatch, capsys):
    """Calls a script's `main` with arguments, in this process: a new one takes seconds to start."""

    def call(main, *args) -> CompletedProcess:
        arguments = [getattr(main, '__module__', 'script'), *map(str, args)]
        monkeypatch.setattr(sys, 'argv', arguments)
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as e:
            code = e.code
            if isinstance(code, str):
                print(code, file=sys.stderr)
                code = 1
        out, err = capsys.readouterr()
        return CompletedProcess(arguments, code or 0, out, err)

    return call
