PYTHON ?= python3
UV := .build/uv/bin/uv
VENV := .venv
LOCK = $(UV) pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate -q
INSTALL = --require-hashes --build-constraints locks/build.txt

.PHONY: env locks
env: $(VENV)/.stamp

$(UV): locks/uv.txt
	$(PYTHON) -m venv --clear .build/uv
	.build/uv/bin/pip install -q --disable-pip-version-check --require-hashes -r locks/uv.txt
	touch $@

$(VENV)/.stamp: $(UV) locks/dev.txt locks/build.txt pyproject.toml
	test -x $(VENV)/bin/python || $(UV) venv -q --python $(PYTHON) $(VENV)
	$(UV) pip sync -q --python $(VENV)/bin/python $(INSTALL) locks/dev.txt
	$(UV) pip install -q --python $(VENV)/bin/python --no-deps --no-build-isolation -e .
	touch $@

locks: $(UV)
	echo 'uv==0.13.9' | $(LOCK) - -o locks/uv.txt
	printf 'hatchling>=1.27\nsetuptools>=80\nwheel\n' | $(LOCK) - -o locks/build.txt
	$(LOCK) pyproject.toml --extra operator -o locks/operator.txt
	$(LOCK) pyproject.toml --extra trainer -o locks/trainer.txt
	$(LOCK) pyproject.toml --extra dev -o locks/dev.txt
