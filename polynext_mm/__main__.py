"""``python -m polynext_mm run SCRIPT ARGS...``: run a script with polynext_mm imported first.

``run`` is for scripts of other projects that import mmcv's operators before they read a config,
where mmcv has no compiled ones: mmdet's tools/test.py, for example. ``timm`` in place of ``run`` is
for scripts on top of timm, such as its train.py and validate.py: they can then create a PolyNeXt.
"""

import importlib
import runpy
import sys
from pathlib import Path

from polynext_mm.compat import check_stack

COMMANDS = {'run': check_stack, 'timm': lambda: importlib.import_module('polynext_mm.timm')}


def main() -> None:
    if len(sys.argv) < 3 or sys.argv[1] not in COMMANDS:
        sys.exit(f'usage: python -m polynext_mm {{{",".join(COMMANDS)}}} SCRIPT ARGS...')
    prepare, script = COMMANDS[sys.argv[1]], Path(sys.argv[2])
    if not script.is_file():
        sys.exit(f'there is no script {script}')
    prepare()
    sys.argv = sys.argv[2:]
    sys.path[0] = str(script.resolve().parent)  # as `python SCRIPT` sets it
    runpy.run_path(str(script), run_name='__main__')


if __name__ == '__main__':
    main()
