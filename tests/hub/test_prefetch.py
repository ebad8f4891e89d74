"""Weights are brought into the cache before a model is built: once, checked once, as timm would take them."""

import logging
import pickle

import pytest
import timm
import torch
from fake_hub import fake_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import save
from small_models import create

from timm_bilinear.hub import save_model
from timm_bilinear.models import download as hub_client

NAME = 'me/insects'
BACKBONE = 'timm/test_resnet.r160_in1k'
WEIGHTS = 'resolve/.*/(model.safetensors|pytorch_model.bin)'


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setattr(hub_client, 'WAITS', (0.0, 0.0))
    with fake_hub(monkeypatch, tmp_path / 'cache') as server:
        yield server


@pytest.fixture
def backbone():
    return timm.create_model('test_resnet').state_dict()


@pytest.fixture
def hashed(monkeypatch):
    """Files that were hashed."""
    names = []
    for name in ('sha_fileobj', 'git_hash'):
        original = getattr(hub_client, name)
        monkeypatch.setattr(hub_client, name, lambda *args, f=original, n=name: (names.append(n), f(*args))[1])
    return names


def pickled(state_dict, tmp_path):
    torch.save(state_dict, tmp_path / 'weights')
    return (tmp_path / 'weights').read_bytes()


def streams(**kwargs):
    return timm.create_model('bcnn', pretrained=True, **dict(dict(backbone_a='test_resnet', num_classes=3), **kwargs))


def complete(**kwargs):
    overlay = dict(hf_hub_id=NAME, num_classes=3)
    return timm.create_model(
        'bcnn', pretrained=True, backbone_a='test_resnet', pretrained_cfg_overlay=overlay, **kwargs
    )


def assert_backbone(model, state_dict):
    assert torch.equal(model.state_dict()['stream_a.conv1.0.weight'], state_dict['conv1.0.weight'])


def add_complete(hub):
    model = create(backbone_a='test_resnet', num_classes=3)
    hub.add_repo(NAME, {'model.safetensors': save(model.state_dict())})
    return model


# --- what is asked for and hashed


@pytest.mark.parametrize('features_only', [False, True])
def test_streams_are_asked_for_once_and_hashed_once(hub, backbone, hashed, features_only):
    hub.add_repo(BACKBONE, {'model.safetensors': save(backbone), 'pytorch_model.bin': b'', 'README.md': b''})
    model = streams(features_only=features_only)
    assert_backbone(model.model if features_only else model, backbone)
    assert hub.count(f'HEAD .*{WEIGHTS}') == hub.count('GET /large/') == hub.count('paths-info') == 1
    assert len(hub.requests) == 3 and hashed == ['sha_fileobj']
    streams()
    assert hub.requests[3:] == [('HEAD', f'/{BACKBONE}/resolve/main/model.safetensors')] and len(hashed) == 1


def test_complete_weights_are_asked_for_once_and_hashed_once(hub, hashed, tmp_path):
    expected = add_complete(hub)
    for _ in range(2):
        model = complete(cache_dir=tmp_path / 'elsewhere')
        assert all(torch.equal(v, expected.state_dict()[k]) for k, v in model.state_dict().items())
        assert model.pretrained_cfg['hf_hub_id'] == NAME
    assert hub.count(f'HEAD .*{WEIGHTS}') == 2 and hub.count('GET /large/') == len(hashed) == 1
    assert not (tmp_path / 'cache').exists()


def test_new_commit_is_taken_and_checked(hub, backbone, hashed):
    hub.add_repo(BACKBONE, {'model.safetensors': save(backbone)})
    streams()
    changed = {k: v + 1 for k, v in backbone.items()}
    hub.repos[BACKBONE].commit({'model.safetensors': save(changed)})
    assert_backbone(streams(), changed)
    assert len(hashed) == 2


@pytest.mark.parametrize('overlay', ['file', 'state_dict', 'url'])
def test_other_sources_ask_for_nothing(hub, tmp_path, overlay, monkeypatch):
    model = create(backbone_a='test_resnet', num_classes=3)
    torch.save(model.state_dict(), tmp_path / 'w.pth')
    source = dict(
        file=dict(file=str(tmp_path / 'w.pth')),
        state_dict=dict(state_dict=model.state_dict()),
        url=dict(url=(tmp_path / 'w.pth').as_uri(), hf_hub_id=None),
    )[overlay]
    loaded = timm.create_model(
        'bcnn', pretrained=True, backbone_a='test_resnet', pretrained_cfg_overlay=dict(source, num_classes=3)
    )
    assert torch.equal(loaded.head.fc.weight, model.head.fc.weight)
    assert not hub.requests


def test_timms_old_cache_comes_first(hub, tmp_path, monkeypatch):
    monkeypatch.setattr('timm.models._builder._USE_OLD_CACHE', True)  # TIMM_USE_OLD_CACHE=1
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path))
    model = create(backbone_a='test_resnet', num_classes=3)
    (tmp_path / 'checkpoints').mkdir()
    torch.save(model.state_dict(), tmp_path / 'checkpoints' / 'w.pth')
    loaded = streams(pretrained_cfg_overlay=dict(url='https://example.invalid/w.pth', hf_hub_id=NAME, num_classes=3))
    assert torch.equal(loaded.head.fc.weight, model.head.fc.weight)
    assert not hub.requests


def test_without_weights_nothing_is_asked_for(hub):
    create(backbone_a='test_resnet')
    assert not hub.requests


def test_named_file_alone(hub, backbone):
    hub.add_repo(BACKBONE, {'model.safetensors': b'', 'other/w.bin': b'', 'other/w.safetensors': save(backbone)})
    overlay = dict(hf_hub_filename='other/w.bin')
    overlay.update(hub_client.prefetch(dict(timm.get_pretrained_cfg('test_resnet').to_dict(), **overlay)))
    model = timm.create_model('test_resnet', pretrained=True, pretrained_cfg_overlay=overlay)
    for key, value in model.state_dict().items():
        assert torch.equal(value, backbone[key])
    assert hub.count('HEAD .*/other/w.safetensors') == 1 and hub.count('model.safetensors') == 0


# --- caches that hold what an earlier, other load left


@pytest.mark.parametrize('how', ['offline', 'down', 'unreachable'])
@pytest.mark.parametrize('build', [streams, lambda: timm.create_model('test_resnet', pretrained=True)])
def test_pickle_in_the_cache_is_enough(hub, backbone, tmp_path, monkeypatch, build, how):
    hub.add_repo(BACKBONE, {'pytorch_model.bin': pickled(backbone, tmp_path)})
    hub_client.download(BACKBONE, 'pytorch_model.bin')
    if how == 'offline':
        monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    elif how == 'down':
        hub.fault('', 503, times=9999)
    else:
        hub.close()
    weights = build().state_dict()
    assert any(torch.equal(value, backbone['conv1.0.weight']) for value in weights.values())


def test_denied_weights_get_no_pickle_in_their_place(hub, backbone, tmp_path):
    hub.add_repo(BACKBONE, {'model.safetensors': save(backbone), 'pytorch_model.bin': pickled(backbone, tmp_path)})
    hub_client.download(BACKBONE, 'pytorch_model.bin')
    hub.fault('HEAD .*/model.safetensors', 403, times=9999)
    with pytest.raises(RuntimeError, match=r'model\.safetensors.*forbidden \(403\)'):
        streams()


# --- mirrors


@pytest.mark.parametrize('etag', ['a' * 40, 'b' * 64, 'W/x'])
@pytest.mark.parametrize('has_api', [True, False])
def test_mirrors_may_name_files_as_they_like(hub, backbone, tmp_path, etag, has_api, caplog):
    hub.etag, hub.has_api = etag, has_api
    hub.add_repo(BACKBONE, {'model.safetensors': save(backbone)})
    with caplog.at_level(logging.DEBUG, logger=hub_client.__name__):
        for _ in range(2):
            assert_backbone(streams(), backbone)
    assert hub.count('GET /large/') == 1
    assert any('is not checked' in r.message for r in caplog.records) != has_api
    assert not [r for r in caplog.records if r.levelno > logging.DEBUG]


@pytest.mark.parametrize('etag', ['a' * 64, None])
def test_damaged_weights_are_fetched_again(hub, backbone, etag):
    hub.etag = etag
    hub.add_repo(BACKBONE, {'model.safetensors': save(backbone)})
    hub.fault('GET /large/', 'flip')
    assert_backbone(streams(), backbone)
    assert hub.count('GET /large/') == 2


# --- errors are caught as those of any timm model


@pytest.mark.parametrize(
    'case,error',
    [
        ('offline', LocalEntryNotFoundError),
        ('down', LocalEntryNotFoundError),
        ('no repo', RepositoryNotFoundError),
        ('no file', EntryNotFoundError),
        ('broken', HTTPError),
    ],
)
@pytest.mark.parametrize('build', [streams, complete])
def test_errors_are_of_both_kinds(hub, monkeypatch, backbone, case, error, build):
    files = {} if case == 'no file' else {'model.safetensors': save(backbone)}
    if case != 'no repo':
        hub.add_repo(NAME, files)
        hub.add_repo(BACKBONE, files)
    if case == 'offline':
        monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    if case == 'down':
        hub.fault('HEAD', 503, times=9999)
    if case == 'broken':
        hub.fault('GET /large/', 500, times=9999)
    with pytest.raises(error) as e:
        build()
    assert isinstance(e.value, RuntimeError) and '\n' not in str(e.value)
    assert (NAME if build is complete else BACKBONE) in str(e.value)
    if error is RepositoryNotFoundError:
        assert e.value.response.status_code == 404
    copy = pickle.loads(pickle.dumps(e.value))
    assert isinstance(copy, hub_client.UnavailableError) and str(copy) == str(e.value)

    # a plain timm model raises what it raises without this package
    with pytest.raises(error) as plain:
        timm.create_model('test_resnet', pretrained=True)
    assert not isinstance(plain.value, RuntimeError) and type(plain.value).__module__ == 'huggingface_hub.errors'


def test_missing_revision(hub, backbone):
    hub.add_repo(NAME, {'model.safetensors': save(backbone)})
    overlay = dict(hf_hub_id=f'{NAME}@v9')
    with pytest.raises(RevisionNotFoundError, match='no such revision') as e:
        timm.create_model('bcnn', pretrained=True, backbone_a='test_resnet', pretrained_cfg_overlay=overlay)
    assert isinstance(e.value, RuntimeError)


def test_offline_error_of_the_client(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise OfflineModeIsEnabled('offline')

    monkeypatch.setattr(hub_client, 'hf_hub_download', refuse)
    with pytest.raises(ConnectionError) as e:
        hub_client.download(NAME, 'model.safetensors', cache_dir=tmp_path)
    assert isinstance(e.value, hub_client.UnavailableError) and isinstance(e.value, OfflineModeIsEnabled)


def test_file_system_errors_are_their_own(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise PermissionError(13, 'Permission denied', str(tmp_path))

    monkeypatch.setattr(hub_client, 'hf_hub_download', refuse)
    with pytest.raises(PermissionError) as e:
        hub_client.download(NAME, 'model.safetensors', cache_dir=tmp_path)
    assert not isinstance(e.value, RuntimeError)


def test_saved_model_of_the_hub(hub, tmp_path, hashed):
    model = create(backbone_a='test_resnet', num_classes=3)
    folder = save_model(model, tmp_path / 'model')
    hub.add_repo(NAME, {path.name: path.read_bytes() for path in folder.iterdir()})
    hub.repos[NAME].refs['v1'] = hub.repos[NAME].commits[-1][0]
    loaded = timm.create_model(f'hf-hub:{NAME}@v1', pretrained=True)
    assert torch.equal(loaded.head.fc.weight, model.head.fc.weight)
    assert loaded.pretrained_cfg['hf_hub_id'] == f'{NAME}@v1' and hashed == ['sha_fileobj']
