"""The page, in a browser: headless Chromium, Debian's, driven by Playwright."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from small_models import ONE

import timm_bilinear
from timm_bilinear.hub import save_model

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason='there is no Chromium here')
NAMES = ['cat', 'dog', 'owl', 'fox', 'emu']


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """A model, pictures, an index of them, and files that are no pictures."""
    folder = tmp_path_factory.mktemp('app')
    torch.manual_seed(0)
    save_model(
        timm.create_model('bcnn', **ONE), folder / 'model', label_names=NAMES, data_config=dict(input_size=(3, 96, 96))
    )
    (folder / 'pictures' / 'owl').mkdir(parents=True)
    for i in range(3):
        values = np.random.default_rng(i).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(values).resize((120, 90)).save(folder / 'pictures' / 'owl' / f'{i}.png')
    timm_bilinear.index_images(folder / 'model', folder / 'pictures', folder / 'index', dim=64)
    (folder / 'broken.png').write_bytes(b'no picture')
    Image.new('1', (20_000, 20_000)).save(folder / 'huge.png')
    return folder


@pytest.fixture(scope='module')
def address(files):
    pytest.importorskip('gradio')
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    command = [sys.executable, '-m', 'timm_bilinear', 'app', files / 'model', '--index', files / 'index']
    temp = files / 'tmp'
    temp.mkdir()
    process = subprocess.Popen(
        [*map(str, command), '--port', str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=dict(os.environ, TMPDIR=str(temp), CUDA_VISIBLE_DEVICES=''),
    )
    url = f'http://127.0.0.1:{port}'
    for _ in range(240):
        try:
            urllib.request.urlopen(url, timeout=1).close()
            break
        except OSError:
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.5)
    yield url
    process.send_signal(signal.SIGINT)
    process.wait(30)
    assert not list(temp.glob('timm_bilinear_app_*'))  # nothing of what was uploaded is left


@pytest.fixture
def page(address):
    sync_api = pytest.importorskip('playwright.sync_api')
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        page = browser.new_page(viewport=dict(width=1200, height=1500))
        page.goto(address)
        page.wait_for_selector('#sentence')
        yield page
        browser.close()


def upload(page, file, expected):
    page.set_input_files('input[type=file]', str(file))
    page.wait_for_function('(text) => document.querySelector("#sentence").innerText.includes(text)', arg=expected)
    return page.inner_text('#sentence')


def test_picture(page, files, tmp_path):
    best = timm_bilinear.predict(str(files / 'model'), str(files / 'pictures' / 'owl' / '1.png'))[0]['predictions'][0]
    said = upload(page, files / 'pictures' / 'owl' / '1.png', best['name'])
    percent = float(said.split(',')[1].split('%')[0])
    assert percent == pytest.approx(100 * best['probability'], abs=1)  # there in bfloat16
    page.wait_for_selector('img[src*="image.png"]')
    assert page.locator('text=owl, 1.000').count() >= 1  # it looks like itself
    page.screenshot(path=tmp_path / 'page.png')
    other = next(name for name in NAMES if name != best['name'])
    page.get_by_label('Rather than').click()
    page.get_by_role('option', name=other, exact=True).click()
    page.wait_for_timeout(3000)
    assert best['name'] in page.inner_text('#sentence')


@pytest.mark.parametrize(
    'name, sentence', [('broken.png', 'no picture that can be read'), ('huge.png', 'exceeds limit')]
)
def test_no_picture(page, files, name, sentence):
    said = upload(page, files / name, 'no picture')
    assert sentence in said
    upload(page, files / 'pictures' / 'owl' / '0.png', '%')  # and the next one is answered
