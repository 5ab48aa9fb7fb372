# make run    install, start the server with the embedded model, ask two questions, leave it up
# make demo   the same, but end the server after the answers
# make test   every check, then the tests
# make check  format, lint, types and the import order of the folders

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
KERNELS := setup.py $(wildcard kernels/native/*.cpp kernels/native/*.h kernels/native/*.map)
TYPED := $(VENV)/typed

.DELETE_ON_ERROR:
.PHONY: run demo test check install

run: $(INSTALLED)
	@$(BIN)/inference-pio demo

demo: $(INSTALLED)
	@$(BIN)/inference-pio demo --exit

test: check
	@$(call step,tests,$(BIN)/python -m pytest)

# The repository root is the package, so mypy needs a folder in which it has the package's name.
check: $(INSTALLED)
	@$(call step,format,$(BIN)/ruff format --check .)
	@$(call step,lint,$(BIN)/ruff check .)
	@mkdir -p $(TYPED) && ln -sfn "$(CURDIR)" $(TYPED)/inference_pio
	@$(call step,types,MYPYPATH=$(TYPED) $(BIN)/mypy --strict -p inference_pio --exclude /tests/)
	@$(call step,import order,$(BIN)/python -m pytest -q tests/test_floors.py)

install: $(INSTALLED)

# The installation compiles the native kernels, so it is made anew when their sources change.
$(INSTALLED): pyproject.toml constraints.txt $(KERNELS)
	@$(call step,virtual environment,test -x $(BIN)/python || $(PYTHON) -m venv $(VENV))
	@$(call step,packages, \
		$(BIN)/python -m pip install --progress-bar on -c constraints.txt -e '.[dev$(comma)bench]')
	@touch $@

comma := ,

# $(call step,name,command): says what runs, and which step it was that failed.
define step
echo "==> $(1)"; { $(2); } || { echo "==> FAILED: $(1)" >&2; exit 1; }
endef
