# Needs Python 3.10 or newer, test-openmmlab 3.9 to 3.11. VENV, PYTHON, JOBS, BUDGET and MMCV_WHEEL
# can be set on the command line. Durations were measured on two cores. `make -n TARGET` shows the commands.
VENV ?= .venv
PYTHON ?= python3
JOBS ?= 2
SLOW ?= tests

# Errors only. The versions are pinned and the mm packages installed without their dependencies, so
# what pip warns about is meant to be so.
PIP = $(VENV)/bin/python -m pip install -qq --disable-pip-version-check --no-warn-conflicts
PIP_UPSTREAM = $(UPSTREAM)/bin/python -m pip -qq --disable-pip-version-check
RUN = $(VENV)/bin/python
INSTALLED = $(VENV)/.installed
# Of upstream's packages. MMCV_WHEEL names a compiled mmcv 2.1.0; without it, mmcv-lite is installed.
UPSTREAM = $(VENV)-openmmlab
MMCV = $(or $(MMCV_WHEEL),mmcv-lite==2.1.0)
UPSTREAM_INSTALLED = $(UPSTREAM)/.installed-$(notdir $(MMCV))

.PHONY: install demo demo-detection tables lint quick test test-slow test-cuda test-openmmlab clean
.SILENT:

install: $(INSTALLED)

$(INSTALLED): pyproject.toml requirements/torch.txt requirements/base.txt requirements/onedl.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit( \
	    "Python 3.10 or newer is needed, and this is %s: set PYTHON=python3.x" % sys.version)'
	echo '==> Creating a virtual environment in $(VENV) (seconds)'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	echo '==> Installing torch (minutes: up to 3 GB to download)'
	$(PIP) -r requirements/torch.txt
	echo '==> Installing what the mm packages and the checks need (about a minute)'
	$(PIP) -r requirements/base.txt
	echo '==> Installing mmengine, mmcv, mmsegmentation and mmdetection (about a minute)'
	$(PIP) --no-deps -r requirements/onedl.txt
	echo '==> Installing polynext_mm from this folder (seconds)'
	$(PIP) --no-deps --editable .
	touch $@

demo: $(INSTALLED)
	echo '==> Training and evaluating a segmentor on demo/materials (about 6 minutes on two cores)'
	$(RUN) demo/segmentation.py

demo-detection: $(INSTALLED)
	echo '==> Training and evaluating four detectors on demo/materials (about 13 minutes on two cores,'
	echo '    or 18 if "make demo" was not run before: the first starts from its backbone)'
	$(RUN) demo/detection.py

tables: $(INSTALLED)
	echo '==> Writing metafiles and tables from the configs (about a minute)'
	$(RUN) configs/metafiles/generate.py

lint: $(INSTALLED)
	echo '==> Checking style, format and types (seconds)'
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# While working: no test that starts processes, trains, exports, interprets Triton or measures networks.
quick: $(INSTALLED)
	echo '==> Running the quick tests (about 2 minutes)'
	$(RUN) -m pytest -n $(JOBS) -m 'not heavy and not slow and not cuda'

test: lint
	echo '==> Running the tests, slow ones excepted (5 to 8 minutes)'
	$(RUN) -m pytest -n $(JOBS) -m 'not slow and not cuda'

test-slow: $(INSTALLED)
	echo '==> Running the slow tests (about 25 minutes)'
	$(RUN) -m pytest -n $(JOBS) -m 'slow and not cuda' $(SLOW)

# On a machine with a GPU, the first thing to run. Without one it says so. BUDGET=600 ends it in time.
test-cuda: $(INSTALLED)
	echo '==> Comparing the GPU with the CPU, and measuring, in stages (at most 25 minutes)'
	$(RUN) -m tests.cuda.gpu_report $(if $(BUDGET),--budget $(BUDGET))

# The environment that most users of upstream's have, torch 2.1 included. Tests of what newer torch has
# are skipped, with the reason; benchmarks and docs are for today's.
test-openmmlab: $(UPSTREAM_INSTALLED)
	echo '==> Running the tests on upstream OpenMMLab and torch 2.1, slow ones excepted (4 to 8 minutes)'
	$(UPSTREAM)/bin/python -m pytest -n $(JOBS) -m 'not slow and not cuda' \
	    --ignore tests/benchmarks --ignore tests/cuda --ignore tests/test_cuda_report.py \
	    --ignore tests/docs

$(UPSTREAM_INSTALLED): pyproject.toml requirements/openmmlab-base.txt requirements/openmmlab.txt
	$(PYTHON) -c 'import sys; (3, 9) <= sys.version_info < (3, 12) or sys.exit( \
	    "torch 2.1 needs Python 3.9 to 3.11, and this is %s: set PYTHON=python3.x" % sys.version)'
	echo "==> Installing torch 2.1 and upstream OpenMMLab's packages into $(UPSTREAM) (minutes: up to"
	echo '    3 GB to download)'
	rm -f $(UPSTREAM)/.installed-*
	test -x $(UPSTREAM)/bin/python || $(PYTHON) -m venv $(UPSTREAM)
	$(PIP_UPSTREAM) install -r requirements/openmmlab-base.txt
	$(PIP_UPSTREAM) install --no-deps -r requirements/openmmlab.txt
	$(PIP_UPSTREAM) uninstall -y mmcv mmcv-lite
	$(PIP_UPSTREAM) install --no-deps $(MMCV)
	$(PIP_UPSTREAM) install --no-deps --editable .
	touch $@

clean:
	echo '==> Deleting $(VENV), $(UPSTREAM) and work_dirs'
	rm -rf $(VENV) $(UPSTREAM) work_dirs
