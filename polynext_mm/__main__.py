"""``python -m polynext_mm run SCRIPT ARGS...``: run a script with polynext_mm imported first.

For scripts of other projects that import mmcv's operators before they read a config, where mmcv
has no compiled ones: mmdet's tools/test.py, for example.
"""

import runpy
import sys
from pathlib import Path

from polynext_mm.compat import check_stack


def main() -> None:
    if len(sys.argv) < 3 or sys.argv[1] != 'run':
        sys.exit('usage: python -m polynext_mm run SCRIPT ARGS...')
    script = Path(sys.argv[2])
    if not script.is_file():
        sys.exit(f'there is no script {script}')
    check_stack()
    sys.argv = sys.argv[2:]
    sys.path[0] = str(script.resolve().parent)  # as `python SCRIPT` sets it
    runpy.run_path(str(script), run_name='__main__')


if __name__ == '__main__':
    main()
