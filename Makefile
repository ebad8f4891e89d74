# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two processes of one thread take half the time of one of two. A file's tests share what it sets up.
PYTEST := -m pytest -q -n 2 --dist loadfile
unit timm-tests: export OMP_NUM_THREADS = 1

.PHONY: demo test gpu install lint unit timm-tests clean

demo: install
	$(BIN)/python hub/fonts/demo.py

test: install lint unit timm-tests

# Everything that waits for a GPU, in nine minutes; writes docs/benchmark_*_cuda.md and docs/gpu_tiles.md.
gpu: install
	$(BIN)/python tests/ops/gpu_day.py

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -e '.[demo,test]'
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

unit: install
	$(BIN)/python $(PYTEST) tests

# timm's own model tests, unchanged, from the sdist of the installed version; those named 'pretrained' need the Hub.
timm-tests: install
	set -e; version=$$($(BIN)/python -c 'import timm; print(timm.__version__)'); sdist=$(VENV)/timm-$$version; \
	if [ ! -d $$sdist ]; then \
		$(BIN)/pip download -q --disable-pip-version-check --no-deps --no-binary timm -d $(VENV) timm==$$version; \
		tar -xzf $$sdist.tar.gz -C $(VENV); \
	fi; \
	cd $$sdist && ../bin/python $(PYTEST) --dist load -p timm_bilinear -k '(bcnn or mpncov or hbp or lrbp) and not pretrained' tests/test_models.py

clean:
	rm -rf $(VENV) .demo
