"""Push and pull through the real client, against a Hub on loopback that has its bad moments."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from fake_hub import TOKEN
from hub_cases import LABELS, NAME, assert_same, files_of, pull, push
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError
from small_models import create

import timm_bilinear
from timm_bilinear.cli import main
from timm_bilinear.hub import save_model
from timm_bilinear.hub.client import file_hashes

WEIGHTS = 'GET /large/'
CONFIG = '/me/insects/resolve/.*/config.json'


def cached(tmp_path):
    return [
        p for p in (tmp_path / 'cache').rglob('*') if p.is_file() and 'blobs' in p.parts and p.suffix != '.incomplete'
    ]


# --- the server is a Hub for the plain client


def test_plain_client(hub, tmp_path):
    api = HfApi()
    assert api.whoami()['name'] == 'me'
    api.create_repo(NAME)
    folder = tmp_path / 'folder'
    folder.mkdir()
    (folder / 'x.txt').write_text('text')
    (folder / 'x.safetensors').write_bytes(b'weights' * 1000)
    api.upload_folder(repo_id=NAME, folder_path=folder)
    assert api.file_exists(NAME, 'x.txt') and not api.file_exists(NAME, 'y.txt')
    infos = {info.path: info for info in api.get_paths_info(NAME, ['x.txt', 'x.safetensors'])}
    for path in folder.iterdir():
        sha256, blob_id = file_hashes(path)
        info = infos[path.name]
        assert info.size == path.stat().st_size
        assert (info.lfs.sha256 == sha256) if info.lfs else (info.blob_id == blob_id)
        assert Path(hf_hub_download(NAME, path.name)).read_bytes() == path.read_bytes()
    assert infos['x.safetensors'].lfs and not infos['x.txt'].lfs
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(NAME, 'y.txt')
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(NAME, 'x.txt', revision='v2')
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download('me/other', 'x.txt')


# --- push, pull


def test_push_and_pull(hub, model):
    url = push(model, private=True)
    assert url == f'{hub.endpoint}/{NAME}' and hub.repos[NAME].private
    _, files = hub.repos[NAME].commits[-1]
    assert {'README.md', 'config.json', 'model.safetensors'} == set(files) - {'.gitattributes'}
    loaded = pull()
    assert_same(loaded, model)
    assert list(loaded.pretrained_cfg['label_names']) == LABELS
    assert len(hub.repos[NAME].commits) == 2


def test_push_again_changes_nothing(hub, model):
    push(model)
    push(model)
    assert len(hub.repos[NAME].commits) == 2


def test_command(hub, model, tmp_path, capsys):
    save_model(model, tmp_path / 'run', LABELS)
    main(['push', str(tmp_path / 'run'), '--repo', NAME])
    assert f'Pushed to {hub.endpoint}/{NAME}' in capsys.readouterr().out
    assert_same(pull(), model)


def test_other_classes_keep_the_streams(hub, model):
    push(model)
    loaded = pull(num_classes=7)
    assert loaded.head.fc.weight.shape[0] == 7
    for name, value in model.stream_a.state_dict().items():
        assert torch.equal(loaded.stream_a.state_dict()[name], value)


def test_revision_and_cache_dir(hub, model, tmp_path):
    push(model)
    hub.repos[NAME].refs['v1'] = hub.repos[NAME].commits[-1][0]
    changed = create(backbone_a='test_resnet', backbone_b='test_vit', proj_dim=8, eps=1e-3, num_classes=3)
    push(changed)
    assert_same(pull(f'{NAME}@v1', cache_dir=tmp_path / 'elsewhere'), model)
    assert_same(pull(), changed)
    assert list((tmp_path / 'elsewhere').rglob('model.safetensors'))


def test_offline_from_the_cache(hub, model, monkeypatch):
    push(model)
    pull()
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    before = len(hub.requests)
    assert_same(pull(), model)
    assert len(hub.requests) == before


# --- faults while pulling


@pytest.mark.parametrize('kind', [500, 503, 'reset', 'reset-body', 'close-body', 'flip'])
@pytest.mark.parametrize('what', [WEIGHTS, 'HEAD /me/insects/resolve/.*/model.safetensors', 'paths-info'])
def test_one_fault_is_survived(hub, model, tmp_path, what, kind):
    if what.startswith('HEAD') and kind in ('reset-body', 'close-body', 'flip'):
        pytest.skip('an answer to HEAD has no body')
    hub.add_repo(NAME, files_of(model, tmp_path))
    hub.fault(what, kind)
    assert_same(pull(), model)
    assert hub.faults[0].times == 0


@pytest.mark.parametrize(
    'what,kind', [('HEAD', 500), ('HEAD', 503), ('HEAD', 429), ('GET', 429), ('GET', 'close-body')]
)
def test_one_fault_of_the_config_is_survived(hub, model, tmp_path, what, kind):
    # timm reads config.json by itself, before this package has a say: these are the client's own second tries.
    hub.add_repo(NAME, files_of(model, tmp_path))
    hub.fault(f'{what} {CONFIG}', kind)
    assert_same(pull(), model)
    assert hub.faults[0].times == 0


@pytest.mark.parametrize(
    'what,kind', [('HEAD', 'reset'), ('GET', 500), ('GET', 503), ('GET', 'reset'), ('GET', 'reset-body')]
)
def test_other_faults_of_the_config_are_the_clients_errors(hub, model, tmp_path, what, kind):
    hub.add_repo(NAME, files_of(model, tmp_path))
    hub.fault(f'{what} {CONFIG}', kind)
    with pytest.raises(HTTPError):
        pull()
    assert_same(pull(), model)


def test_damaged_weights_are_not_loaded_nor_kept(hub, model, tmp_path):
    hub.add_repo(NAME, files_of(model, tmp_path))
    hub.fault(WEIGHTS, 'flip', times=99)
    with pytest.raises(
        RuntimeError, match=rf"model.safetensors of the Hugging Face Hub repo '{NAME}': the bytes received"
    ):
        pull()
    assert not [p for p in cached(tmp_path) if p.stat().st_size > 10_000]
    hub.faults.clear()
    assert_same(pull(), model)


@pytest.mark.parametrize('kind,cause', [(403, r'forbidden \(403\)'), (503, '503'), (401, '401|private'), ('reset', '')])
def test_lasting_faults_are_one_sentence_and_no_pickle(hub, model, tmp_path, kind, cause):
    files = files_of(model, tmp_path)
    torch.save(model.state_dict(), tmp_path / 'w.bin')
    hub.add_repo(NAME, dict(files, **{'pytorch_model.bin': (tmp_path / 'w.bin').read_bytes()}))
    hub.fault('/me/insects/resolve/.*/model.safetensors', kind, times=999)
    with pytest.raises(RuntimeError, match=f"model.safetensors of the Hugging Face Hub repo '{NAME}'.*{cause}") as e:
        pull()
    assert '\n' not in str(e.value)
    assert hub.count('pytorch_model.bin') == 0


def test_missing_weights_are_named(hub, model, tmp_path):
    hub.add_repo(NAME, {'config.json': files_of(model, tmp_path)['config.json']})
    with pytest.raises(RuntimeError, match=rf"'{NAME}' has no model\.safetensors"):
        pull()


@pytest.mark.parametrize('name,error', [('me/other', RepositoryNotFoundError), (f'{NAME}@v9', RevisionNotFoundError)])
def test_missing_repo_or_revision(hub, model, tmp_path, name, error):
    hub.add_repo(NAME, files_of(model, tmp_path))
    with pytest.raises(error, match=name.split('@')[0]):  # of config.json, by timm and the client alone
        pull(name)
    with pytest.raises(RuntimeError, match=f"'{name.split('@')[0]}': .* no such") as e:
        timm.create_model('bcnn', pretrained=True, pretrained_cfg_overlay=dict(hf_hub_id=name))
    assert isinstance(e.value, error) and '\n' not in str(e.value)


def test_pickles_hold_weights_only(hub, model, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'evil'),)

    files = files_of(model, tmp_path)
    config = {'config.json': files['config.json']}
    torch.save(dict(model.state_dict(), evil=Evil()), tmp_path / 'w.bin')
    hub.add_repo(NAME, dict(config, **{'pytorch_model.bin': (tmp_path / 'w.bin').read_bytes()}))
    with pytest.raises(Exception, match=r'[Ww]eights'):
        pull()
    assert not (tmp_path / 'evil').exists()
    torch.save(model.state_dict(), tmp_path / 'w.bin')
    hub.add_repo('me/pickled', dict(config, **{'pytorch_model.bin': (tmp_path / 'w.bin').read_bytes()}))
    assert_same(pull('me/pickled'), model)


def test_full_disk(hub, model, tmp_path, monkeypatch):
    hub.add_repo(NAME, files_of(model, tmp_path))

    def full(*_, **__):
        raise OSError(errno.ENOSPC, 'No space left on device')

    hf_hub_download(NAME, 'config.json')
    monkeypatch.setattr(huggingface_hub.file_download, 'http_get', full)
    message = r"No space left for model.safetensors of .*'me/insects' in the cache '.*cache'"
    with pytest.raises(RuntimeError, match=message) as e:
        pull()
    assert isinstance(e.value, OSError) and e.value.errno == errno.ENOSPC


def test_two_processes_at_once(hub, model, tmp_path):
    hub.add_repo(NAME, files_of(model, tmp_path))
    code = f"import timm, timm_bilinear; timm.create_model('hf-hub:{NAME}', pretrained=True)"
    env = dict(
        os.environ,
        HF_ENDPOINT=hub.endpoint,
        HF_HUB_CACHE=str(tmp_path / 'cache'),
        HF_HUB_DISABLE_XET='1',
        HF_TOKEN=TOKEN,
    )
    runs = [subprocess.Popen([sys.executable, '-c', code], env=env) for _ in range(2)]
    assert [run.wait(120) for run in runs] == [0, 0]
    assert_same(pull(), model)


# --- faults while pushing

CREATE, COMMIT, UPLOAD = 'POST /api/repos/create', 'POST .*/commit/', 'PUT /large/'


@pytest.mark.parametrize('kind', [500, 503, 'reset', 'lost-answer'])
@pytest.mark.parametrize('what', [CREATE, COMMIT, UPLOAD, 'paths-info', 'preupload', 'objects/batch'])
def test_push_survives_one_fault(hub, model, what, kind):
    hub.fault(what, kind)
    push(model)
    assert hub.faults[0].times == 0
    assert len(hub.repos[NAME].commits) == 2, 'one commit after the one that made the repo'
    assert_same(pull(), model)


@pytest.mark.parametrize('kind,cause', [(401, 'HF_TOKEN is missing or wrong'), (403, 'forbidden'), (503, '503')])
def test_push_that_fails_is_one_sentence(hub, model, kind, cause):
    hub.fault(COMMIT, kind, times=999)
    with pytest.raises(RuntimeError, match=f"Could not push to the Hugging Face Hub repo '{NAME}': .*{cause}") as e:
        push(model)
    assert '\n' not in str(e.value)
    assert len(hub.repos[NAME].commits) == 1


@pytest.mark.parametrize('kind', [None, 503, 'reset'])
def test_nothing_private_goes_to_a_public_repo(hub, model, kind):
    hub.add_repo(NAME, {'README.md': b'public'})
    if kind is not None:
        hub.fault('GET /api/models', kind)
    with pytest.raises(RuntimeError, match=f"'{NAME}' is there and public: nothing was sent") as e:
        push(model, private=True)
    assert '\n' not in str(e.value)
    assert hub.count('POST|PUT') == 0 and len(hub.repos[NAME].commits) == 1
    push(model)
    assert not hub.repos[NAME].private


def test_private_again(hub, model):
    push(model, private=True)
    push(create(backbone_a='test_resnet', num_classes=3), private=True)
    assert hub.repos[NAME].private and len(hub.repos[NAME].commits) == 3


def test_repo_of_unknown_visibility_is_not_private(hub, model):
    hub.fault('GET /api/models', 403, times=99)
    with pytest.raises(RuntimeError, match=r'forbidden \(403\)'):
        push(model, private=True)
    assert hub.count('POST|PUT') == 0


@pytest.mark.parametrize('value', [1e5, float('nan')])
def test_overflow_sends_nothing(hub, value):
    model = create(backbone_a='test_resnet', num_classes=3)
    with torch.no_grad():
        model.head.fc.weight[0, 0] = value
    with pytest.raises(ValueError, match=r"the largest value of 'head\.fc\.weight'"):
        push(model, half=True)
    assert not hub.requests


def test_damaged_regular_file_is_noticed(hub, model):
    hub.fault(COMMIT, 'flip-request')
    with pytest.raises(RuntimeError, match=rf"'{NAME}': README.md, config.json\. Push again"):
        push(model)
    push(model)
    assert_same(pull(), model)


def test_nothing_is_sent_before_all_is_built(hub, model, monkeypatch):
    monkeypatch.setattr(timm_bilinear.hub.push, 'create_card', lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        push(model)
    assert not hub.requests and not hub.repos


def test_xet_is_named(hub, model, monkeypatch):
    # The client wants Xet storage as soon as hf_xet is installed; this Hub, like many mirrors, has none.
    pytest.importorskip('hf_xet')
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_DISABLE_XET', False)
    with pytest.raises(RuntimeError, match='HF_HUB_DISABLE_XET=1') as e:
        push(model)
    assert '\n' not in str(e.value)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_DISABLE_XET', True)
    push(model)
    assert_same(pull(), model)
