"""A Space is written, and sent to the Hub."""

import ast
from pathlib import Path

import pytest
import yaml

from timm_bilinear.cli import main
from timm_bilinear.hub.space import push_space, write_space

pytest.importorskip('gradio')
MODEL, SPACE = 'hf-hub:me/insects', 'me/insects-app'


def test_files(tmp_path):
    write_space(MODEL, SPACE, tmp_path / 'space', 'apache-2.0')
    card = (tmp_path / 'space' / 'README.md').read_text(encoding='utf-8')
    metadata = yaml.safe_load(card.split('---')[1])
    assert metadata['sdk'] == 'gradio' and metadata['app_file'] == 'app.py' and metadata['license'] == 'apache-2.0'
    assert metadata['models'] == ['me/insects'] and metadata['title'] == 'insects'
    calls = [
        node for node in ast.walk(ast.parse((tmp_path / 'space' / 'app.py').read_text())) if isinstance(node, ast.Call)
    ]
    assert calls[0].func.id == 'run_app' and calls[0].args[0].value == MODEL
    assert (tmp_path / 'space' / 'requirements.txt').read_text().startswith('timm_bilinear[app]==')


def test_what_is_in_the_repository_is_what_is_written(tmp_path):
    """But for the versions of what is installed here."""
    kept = Path(__file__).parents[2] / 'hub' / 'space'
    name = 'timm-bilinear/bcnn_resnet18_c4.googlefonts378'
    write_space(f'hf-hub:{name}', 'timm-bilinear/fonts', tmp_path / 'space', 'apache-2.0')
    for path in kept.iterdir():
        lines = [
            [line for line in (folder / path.name).read_text('utf-8').splitlines() if 'version' not in line]
            for folder in (kept, tmp_path / 'space')
        ]
        assert lines[0] == lines[1]


def test_pushed(hub):
    assert push_space(MODEL, SPACE) == f'{hub.endpoint}/spaces/{SPACE}'
    _, files = hub.repos[f'spaces/{SPACE}'].commits[-1]
    assert {'README.md', 'app.py', 'requirements.txt'} == set(files) - {'.gitattributes'}
    commits = len(hub.repos[f'spaces/{SPACE}'].commits)
    push_space(MODEL, SPACE)
    assert len(hub.repos[f'spaces/{SPACE}'].commits) == commits  # it is there already
    with pytest.raises(RuntimeError, match='public'):
        push_space(MODEL, SPACE, private=True)


def test_command(hub, tmp_path, capsys):
    main(['push', MODEL, '--repo', SPACE, '--space', '--dry-run', str(tmp_path / 'space')])
    assert 'app.py' in capsys.readouterr().out and not hub.repos
    main(['push', MODEL, '--repo', SPACE, '--space', '--private'])
    assert hub.repos[f'spaces/{SPACE}'].private


@pytest.mark.parametrize(
    'args, code',
    [
        (['push', 'somewhere', '--repo', SPACE, '--space'], 1),
        (['push', MODEL, '--repo', 'insects', '--space'], 1),
        (['push', MODEL, '--repo', SPACE, '--space', '--license', 'my own'], 1),
        (['push', MODEL, '--repo', SPACE, '--space', '--half'], 2),
    ],
)
def test_errors(hub, args, code, capsys):
    with pytest.raises(SystemExit) as e:
        main(args)
    assert (e.value.code if isinstance(e.value.code, int) else 1) == code and not hub.repos
