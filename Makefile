# Needs Python 3.10 or newer. VENV, PYTHON and JOBS can be set on the command line. Durations were
# measured on two cores. `make -n TARGET` shows the commands.
VENV ?= .venv
PYTHON ?= python3
JOBS ?= 2

# Errors only. The versions are pinned and the mm packages installed without their dependencies, so
# what pip warns about is meant to be so.
PIP = $(VENV)/bin/python -m pip install -qq --disable-pip-version-check --no-warn-conflicts
RUN = $(VENV)/bin/python
INSTALLED = $(VENV)/.installed
UPSTREAM = $(VENV)/openmmlab

.PHONY: install demo demo-detection tables lint test test-slow test-cuda test-openmmlab clean
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
	echo '==> Checking style and format of all files (seconds)'
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

test: lint
	echo '==> Running the tests, slow ones excepted (about 9 minutes)'
	$(RUN) -m pytest -n $(JOBS) -m 'not slow and not cuda'

test-slow: $(INSTALLED)
	echo '==> Running the slow tests (about 25 minutes)'
	$(RUN) -m pytest -n $(JOBS) -m 'slow and not cuda'

# On a machine with a GPU, the first thing to run. Without one it says so.
test-cuda: $(INSTALLED)
	echo '==> Comparing the GPU with the CPU, and measuring (more than ten minutes)'
	$(RUN) tests/cuda/gpu_report.py -- -n $(JOBS)

# Upstream's packages are put in front of the default ones. What needs torch alone is left out.
test-openmmlab: $(UPSTREAM)/.installed
	echo '==> Running the tests on upstream OpenMMLab, slow ones excepted (about 9 minutes)'
	PYTHONPATH=$(abspath $(UPSTREAM)) $(RUN) -m pytest -n $(JOBS) -m 'not slow and not cuda' \
	    --ignore tests/nn --ignore tests/benchmarks --ignore tests/docs/test_pages.py

$(UPSTREAM)/.installed: $(INSTALLED) requirements/openmmlab.txt
	echo "==> Installing upstream OpenMMLab's packages into $(UPSTREAM) (about a minute)"
	rm -rf $(UPSTREAM)
	$(PIP) --no-deps --target $(UPSTREAM) -r requirements/openmmlab.txt
	touch $@

clean:
	echo '==> Deleting $(VENV) and work_dirs'
	rm -rf $(VENV) work_dirs
