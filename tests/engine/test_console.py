"""The lines that a training and an evaluation print, and those that only their log file has."""

import io
import logging
import warnings
from pathlib import Path

import pytest
from mmengine.logging import print_log

from polynext_mm.compat.logs import LiveLine, bar, say, without_noise
from polynext_mm.engine import console
from polynext_mm.engine.console import duration
from tests.engine.runs import config


@pytest.mark.parametrize(
    ('seconds', 'text'),
    [
        (0.4, '0 s'),
        (59.6, '1 min 0 s'),
        (200, '3 min 20 s'),
        (8040, '2 h 14 min'),
        (274000, '3 d 4 h'),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.heavy
def test_a_training_prints_a_few_lines_and_its_log_file_has_all(tmp_path, capfd):
    cfg = config('segmentation', tmp_path, iters=2, **{'train_cfg.val_interval': 2})
    with warnings.catch_warnings(), console.quiet('mmseg'):
        warnings.simplefilter('always')
        warnings.warn('before there is a file', stacklevel=1)
        runner = console.QuietRunner.from_cfg(cfg)
        print_log('for the file', logger='current')
        print_log('"FileClient" will be deprecated in future', 'current', logging.WARNING)
        print_log('to be seen', 'current', logging.WARNING)
        say('said')
        runner.train()
        warnings.warn('while it runs', stacklevel=1)
    printed, logged = capfd.readouterr(), Path(runner.logger.log_file).read_text()
    assert not printed.err
    lines = printed.out.splitlines()
    assert len(lines) < 25, printed.out
    assert 'said' in lines and 'WARNING: to be seen' in lines
    last = runner.max_iters
    for start in (
        f'log: {runner.logger.log_file}',
        'network: ',
        'data: ',
        'schedule: ',
        f'iteration 1/{last}  loss ',
        f'iteration {last}/{last}  loss ',
        f'validation at {last}: ',
        'done in ',
        'next: polynext-mm predict IMAGE',
    ):
        assert any(line.startswith(start) for line in lines), (start, printed.out)
    for text in (
        'for the file',
        'to be seen',
        'said',
        'deprecated in future',
        'before there is a file',
        'while it runs',
        'System environment:',
        'Iter(train)',
    ):
        assert text in logged, text
    with pytest.warns(UserWarning, match='afterwards'):
        warnings.warn('afterwards', stacklevel=1)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.heavy
def test_a_detector_prints_its_evaluation_into_the_log_file(tmp_path, capfd):
    with console.quiet('mmdet'):
        cfg = config('detection', tmp_path, iters=1, **{'train_cfg.val_interval': 1})
        runner = console.QuietRunner.from_cfg(cfg)
        runner.train()
    printed, logged = capfd.readouterr().out, Path(runner.logger.log_file).read_text()
    assert 'validation at 1:  coco/bbox_mAP: ' in printed and 'Average' not in printed
    assert ' Average Precision' in logged and 'Accumulating evaluation results' in logged
    assert len(printed.splitlines()) < 20, printed


@pytest.mark.parametrize('terminal', [False, True])
def test_a_live_line_is_for_terminals(monkeypatch, terminal):
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr('sys.stdout', stream)
    monkeypatch.setenv('TERM', 'xterm')
    monkeypatch.setenv('COLUMNS', '40')
    line = LiveLine()
    line.show(f'{bar(1, 4)} 1/4 {"." * 80}')
    line.show('too soon after it')
    line.clear()
    line.clear()
    print('printed')
    drawn = f'\r{bar(1, 4)} 1/4 '.ljust(40, '.') + '\033[K\r\033[K'
    assert stream.getvalue() == (drawn if terminal else '') + 'printed\n'


@pytest.mark.heavy
def test_a_training_on_a_terminal_erases_its_live_line_before_it_prints(tmp_path, monkeypatch):
    stream = Terminal()
    monkeypatch.setattr('sys.stdout', stream)
    monkeypatch.setenv('TERM', 'xterm')
    monkeypatch.setattr(LiveLine, '_PAUSE', 0.0)
    monkeypatch.setattr(console, '_FIRST', 1e9)
    monkeypatch.setattr(console, '_LAST', 1e9)
    with console.quiet('mmseg'):
        runner = console.QuietRunner.from_cfg(config('segmentation', tmp_path))
        runner.train()
    for line in stream.getvalue().split('\n'):
        assert '[' not in line.rpartition('\r\033[K')[2], line
    assert '] 2/6' in stream.getvalue()
    assert '\r' not in Path(runner.logger.log_file).read_text()


def test_what_mm_says_of_itself_when_imported_is_left_out(capsys):
    with without_noise():
        print('Could not import OneDL')
        print('seen', end='')
    print()
    assert capsys.readouterr().out == 'seen\n'
