# Everything needs Python >= 3.10 and nothing else. VENV, PYTHON and JOBS can be set on the command line.
VENV ?= .venv
PYTHON ?= python3
JOBS ?= 2

PIP = $(VENV)/bin/python -m pip install --quiet
RUN = $(VENV)/bin/python
INSTALLED = $(VENV)/.installed
UPSTREAM = $(VENV)/openmmlab

.PHONY: install demo demo-detection test test-slow test-openmmlab lint clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml requirements/torch.txt requirements/base.txt requirements/onedl.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed, this is " + sys.version + ": set PYTHON=python3.x")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements/torch.txt -r requirements/base.txt
	$(PIP) --no-deps -r requirements/onedl.txt
	$(PIP) --no-deps --editable .
	touch $@

demo: $(INSTALLED)
	$(RUN) demo/segmentation.py

demo-detection: $(INSTALLED)
	$(RUN) demo/detection.py

lint: $(INSTALLED)
	$(RUN) -m ruff check .

test: lint
	$(RUN) -m pytest -n $(JOBS) -m 'not slow'

test-slow: $(INSTALLED)
	$(RUN) -m pytest -n $(JOBS) -m slow

# the same tests on upstream OpenMMLab, whose packages are put in front of the default ones
test-openmmlab: $(UPSTREAM)/.installed
	PYTHONPATH=$(abspath $(UPSTREAM)) $(RUN) -m pytest -n $(JOBS) -m 'not slow' tests

$(UPSTREAM)/.installed: $(INSTALLED) requirements/openmmlab.txt
	rm -rf $(UPSTREAM)
	$(PIP) --no-deps --target $(UPSTREAM) -r requirements/openmmlab.txt
	touch $@

clean:
	rm -rf $(VENV) work_dirs
