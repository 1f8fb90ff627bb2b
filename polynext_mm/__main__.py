"""``python -m polynext_mm run SCRIPT ARGS...``: run a script with polynext_mm imported first.

For scripts of other projects that import mmcv's operators before they read a config, where mmcv has none
of its own (mmdet's tools/test.py, for one).
"""

import runpy
import sys
from pathlib import Path

import polynext_mm  # noqa: F401 - importing it is what this is for


def main() -> None:
    if len(sys.argv) < 3 or sys.argv[1] != 'run':
        sys.exit('usage: python -m polynext_mm run SCRIPT ARGS...')
    script = Path(sys.argv[2])
    if not script.is_file():
        sys.exit(f'there is no script {script}')
    sys.argv = sys.argv[2:]
    sys.path[0] = str(script.resolve().parent)  # as python SCRIPT has it
    runpy.run_path(str(script), run_name='__main__')


if __name__ == '__main__':
    main()
