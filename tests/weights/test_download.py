"""Urls and published names: fetched once, completely or not at all; failures say what to do."""

import dataclasses
import hashlib
import http.client
import http.server
import io
import os
import re
import subprocess
import sys
import textwrap
import threading
import urllib.error

import pytest
import torch
from mmengine.runner import CheckpointLoader, load_checkpoint

from polynext_mm import weights
from polynext_mm.weights import PUBLISHED, CheckpointError, published
from tests.helpers.checkpoints import imagenet_weights, is_golden
from tests.helpers.networks import ARCH, build
from tests.weights.hostile import Evil

URL = PUBLISHED[ARCH].url


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """torch.hub's directory for this test."""
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path / 'hub'))
    return tmp_path / 'hub' / 'checkpoints'


@pytest.fixture
def server():
    """A server on this machine: ``server.files`` by path, ``server.asked`` in order."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked.append(self.path)
            body = self.server.files.get(self.path)
            if body is None:
                self.send_error(404)
                return
            self.send_response(200)
            if self.server.tells_length:
                self.send_header('Content-Length', str(len(body)))
            self.end_headers()
            self.wfile.write(body[: self.server.cut])

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        server.files, server.asked, server.cut, server.tells_length = {}, [], None, True
        server.url = f'http://127.0.0.1:{server.server_port}'
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def file_bytes(content, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def place(url, cache):
    """Where the download of a url is kept: under the file's name and a hash of the url."""
    stem, dot, suffix = url.rpartition('/')[2].partition('.')
    return cache / f'{stem}-{hashlib.sha256(url.encode()).hexdigest()[:12]}{dot}{suffix}'


def failure(url, cache) -> str:
    backbone = build(arch=ARCH, init_cfg=dict(type='Pretrained', checkpoint=url))
    with pytest.raises(CheckpointError) as caught:
        backbone.init_weights()
    message = str(caught.value)
    assert url in message
    assert str(place(url, cache)) in message
    assert '`polynext-mm list files` shows where each file belongs' in message
    assert 'from scratch' not in message  # which is no help to who evaluates
    assert not cache.exists() or not list(cache.iterdir())
    return message


def test_a_url_is_fetched_once(cache, server):
    server.files['/weights.pt'] = file_bytes(dict(state_dict_ema=imagenet_weights()))
    for _ in range(2):
        backbone = build(
            arch=ARCH,
            out_norm=False,
            init_cfg=dict(type='Pretrained', checkpoint=f'{server.url}/weights.pt'),
        )
        backbone.init_weights()
        assert is_golden(backbone)
    assert server.asked == ['/weights.pt']
    assert list(cache.iterdir()) == [place(f'{server.url}/weights.pt', cache)]


# Published names


@pytest.fixture
def release(server, monkeypatch):
    """A release on this machine, with the smallest file alone."""
    monkeypatch.setattr(published, '_BASE', f'{server.url}/release/')
    server.files[f'/release/{ARCH}.pt'] = file_bytes(imagenet_weights())
    return server


def by_init_cfg(backbone, name):
    backbone.init_cfg = dict(type='Pretrained', checkpoint=name)
    backbone.init_weights()


@pytest.mark.parametrize(
    ('load', 'scheme'),
    [
        (by_init_cfg, 'polynext://'),
        (load_checkpoint, 'polynext://'),
        (weights.load, 'unsafe:polynext://'),
    ],
)
def test_a_published_name_is_fetched_once(cache, release, load, scheme):
    for _ in range(2):
        backbone = build(arch=ARCH, out_norm=False)
        load(backbone, scheme + ARCH)
        assert is_golden(backbone)
    assert release.asked == [f'/release/{ARCH}.pt']
    assert list(cache.iterdir()) == [place(PUBLISHED[ARCH].url, cache)]


def known(monkeypatch, **figures):
    """Let the smallest published file have figures."""
    file = dataclasses.replace(PUBLISHED[ARCH], **figures)
    monkeypatch.setitem(PUBLISHED, ARCH, file)


def test_size_and_sha256_are_checked_on_download(cache, release, monkeypatch):
    data = release.files[f'/release/{ARCH}.pt']
    digest = hashlib.sha256(data).hexdigest()
    for figures, message in (
        (dict(size=len(data) + 1), f'has {len(data)} bytes instead of {len(data) + 1}'),
        (dict(size=len(data), sha256='0' * 64), 'another SHA-256'),
    ):
        known(monkeypatch, **figures)
        with pytest.raises(CheckpointError, match=message):
            weights.read(f'polynext://{ARCH}')
        assert not list(cache.iterdir())
    known(monkeypatch, size=len(data), sha256=digest)
    weights.read(f'polynext://{ARCH}')


def test_two_urls_of_the_same_file_name_are_two_files(cache, server):
    for folder, value in (('a', 1.0), ('b', 2.0)):
        server.files[f'/{folder}/weights.pt'] = file_bytes({'x.weight': torch.full((2,), value)})
    for folder, value in (('a', 1.0), ('b', 2.0)) * 2:
        content = weights.read(f'{server.url}/{folder}/weights.pt')
        assert content['state_dict']['x.weight'][0] == value
    assert server.asked == ['/a/weights.pt', '/b/weights.pt']


def test_urls_of_mmengines_names_are_read_safely(cache, server, tmp_path, monkeypatch):
    from mmengine.runner import checkpoint

    trace = tmp_path / 'trace'
    content = dict(state_dict={'conv1.weight': torch.ones(2)}, extra=Evil(trace))
    server.files['/resnet.pth'] = file_bytes(content)
    url = f'{server.url}/resnet.pth'
    monkeypatch.setattr(checkpoint, 'get_torchvision_models', lambda: {'resnet': url})
    monkeypatch.setattr(checkpoint, 'get_external_models', lambda: {'resnet': url})
    monkeypatch.setattr(checkpoint, 'get_mmcls_models', lambda: {'resnet': url})
    for source in (url, 'torchvision://resnet', 'open-mmlab://resnet', 'mmcls://resnet'):
        with pytest.raises(CheckpointError, match='eval'):
            load_checkpoint(build(), source)
    assert not trace.exists()


@pytest.mark.parametrize('read', [weights.read, CheckpointLoader.load_checkpoint])
@pytest.mark.parametrize('name', ['', 'cpolynext_x', 'cpolynext_t.pt'])
def test_a_name_that_is_not_published_lists_those_that_are(read, name):
    with pytest.raises(CheckpointError) as caught:
        read(f'polynext://{name}')
    message = str(caught.value)
    assert message.startswith(f'polynext://{name} is not a published file')
    assert all(f'polynext://{known}' in message for known in PUBLISHED)


def test_a_published_file_that_cannot_be_had_names_url_and_place(cache, release):
    url = PUBLISHED['cpolynext_s'].url
    with pytest.raises(CheckpointError, match=re.escape(url)) as caught:
        load_checkpoint(build(), 'polynext://cpolynext_s')
    assert str(place(url, cache)) in str(caught.value)


@pytest.mark.usefixtures('cache')
@pytest.mark.parametrize('rank', [None, '0', '1'])
def test_rank_0_shows_progress(server, capsys, monkeypatch, rank):
    if rank is not None:  # a launcher's, before the processes have joined
        monkeypatch.setenv('RANK', rank)
    server.files['/weights.pt'] = file_bytes(imagenet_weights())
    weights.read(f'{server.url}/weights.pt')
    shown = capsys.readouterr().err
    if rank == '1':
        assert shown == ''
    else:
        assert f'Downloading {server.url}/weights.pt to ' in shown and '100%' in shown


# Failures


def test_a_file_put_in_place_by_hand_needs_no_network(cache, monkeypatch):
    def no_network(*_, **__):
        raise AssertionError('asked for')

    monkeypatch.setattr(torch.hub, 'download_url_to_file', no_network)
    cache.mkdir(parents=True)
    torch.save(imagenet_weights(), place(URL, cache))
    backbone = build(arch=ARCH, out_norm=False)
    load_checkpoint(backbone, URL)
    assert is_golden(backbone)


def test_no_network(cache, monkeypatch):
    def no_network(url, destination, **_):
        open(destination, 'w').write('the first half')
        raise urllib.error.URLError('Name or service not known')

    monkeypatch.setattr(torch.hub, 'download_url_to_file', no_network)
    assert 'Name or service not known' in failure(URL, cache)
    with pytest.raises(CheckpointError, match=re.escape(URL)):
        load_checkpoint(build(arch=ARCH), URL)


def test_a_server_that_breaks_off_in_its_own_way(cache, monkeypatch):
    def breaks(*_, **__):
        raise http.client.IncompleteRead(b'')

    monkeypatch.setattr(torch.hub, 'download_url_to_file', breaks)
    assert 'IncompleteRead' in failure(URL, cache)


def test_a_cache_that_cannot_be_written(tmp_path, cache):
    (tmp_path / 'hub').write_text('a file where the folder should be')
    with pytest.raises(CheckpointError, match='NotADirectoryError|FileExistsError'):
        weights.read(URL)


def test_not_found(cache, server):
    assert '404' in failure(f'{server.url}/weights.pt', cache)


@pytest.mark.parametrize('tells_length', [True, False])
def test_a_body_cut_short(cache, server, tells_length):
    server.files['/weights.pt'] = file_bytes(imagenet_weights())
    server.cut, server.tells_length = 100_000, tells_length
    failure(f'{server.url}/weights.pt', cache)


def test_a_page_in_place_of_the_file(cache, server):
    server.files['/weights.pt'] = b'<html>sign in first</html>'
    assert 'not a complete checkpoint' in failure(f'{server.url}/weights.pt', cache)


@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'legacy'])
def test_other_peoples_files_keep_their_keys(cache, server, zipped):
    content = dict(meta=dict(config='a = 1'), state_dict={'module.x': torch.ones(2)}, epoch=3)
    server.files['/others.pth'] = file_bytes(content, _use_new_zipfile_serialization=zipped)
    loaded = CheckpointLoader.load_checkpoint(f'{server.url}/others.pth', map_location='cpu')
    assert set(loaded) == set(content)
    assert loaded['meta'] == {}  # mmengine would execute the config on resuming
    assert list(loaded['state_dict']) == ['module.x']
    assert server.asked == ['/others.pth']


def test_our_keys_behind_an_unknown_url_are_fetched_once(cache, server):
    server.files['/mine.pth'] = file_bytes(imagenet_weights())
    for _ in range(2):
        content = CheckpointLoader.load_checkpoint(f'{server.url}/mine.pth')
        assert len(content['state_dict']) == len(imagenet_weights())
    assert server.asked == ['/mine.pth']
    assert len(list(cache.iterdir())) == 1


def test_what_mmengine_has_downloaded_is_not_fetched_again(cache, server):
    """Under its name alone, where that has the digest of the content."""
    cache.mkdir(parents=True, exist_ok=True)
    (cache / 'others-0123abcd.pth').write_bytes(file_bytes({'x.weight': torch.ones(2)}))
    (cache / 'others.pth').write_bytes(file_bytes({'y.weight': torch.ones(2)}))
    assert set(CheckpointLoader.load_checkpoint(f'{server.url}/others-0123abcd.pth')) == {
        'x.weight'
    }
    with pytest.raises(CheckpointError, match='404'):
        CheckpointLoader.load_checkpoint(f'{server.url}/others.pth')


RANK = textwrap.dedent("""
    import os
    import sys
    import torch
    import polynext_mm
    from polynext_mm.weights import CheckpointError, read
    torch.hub.set_dir(sys.argv[1])
    torch.distributed.init_process_group(
        'gloo', f'file://{sys.argv[1]}_store', rank=int(os.environ['RANK']), world_size=2
    )
    rank = f'RANK {os.environ["RANK"]}'
    print(rank, len(read(f'{sys.argv[2]}/weights.pt')['state_dict']))
    try:
        read(f'{sys.argv[2]}/absent.pt')
    except CheckpointError as error:
        print(rank, error, flush=True)
        os._exit(1)  # gloo's threads may abort or wait as Python ends
""")


@pytest.mark.heavy
def test_two_ranks_fetch_once_or_both_end(tmp_path, server):
    server.files['/weights.pt'] = file_bytes({'x.weight': torch.ones(2)})
    script = tmp_path / 'rank.py'
    script.write_text(RANK)
    environment = dict(WORLD_SIZE='2', OMP_NUM_THREADS='1')
    ranks = [
        subprocess.Popen(
            [sys.executable, '-W', 'ignore', script, tmp_path / 'hub', server.url],
            env=dict(os.environ, RANK=str(rank), LOCAL_RANK=str(rank), **environment),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]
    printed = [process.communicate(timeout=120)[0] for process in ranks]
    for rank, (process, text) in enumerate(zip(ranks, printed)):
        assert process.returncode == 1, text
        assert f'RANK {rank} 1\n' in text
        assert f'RANK {rank} could not download {server.url}/absent.pt' in text
        assert ('Downloading' in text) == (rank == 0)
    assert server.asked == ['/weights.pt', '/absent.pt']
