PYTHON ?= python3
PYTEST ?=
OLDEST := transformers==5.17.0
# without an NVIDIA GPU the plain name may fetch gigabytes of CUDA; this version has a CPU build in the local index
TORCH := $(if $(shell command -v nvidia-smi),torch,torch==2.13.0)
# two processes of one thread each are faster than one of two
ONE_THREAD := OMP_NUM_THREADS=1
PARALLEL := -n 2 --dist loadgroup
PIP := -m pip install -qq --disable-pip-version-check

without = $(foreach path,$(1),--ignore=tests/$(path))
# what compiles most, runs kernels in the interpreter or needs a process of its own
LONG := $(call without,bench cli docs evaluation kernels/test_append.py kernels/test_attend.py kernels/test_latent.py \
	kernels/test_recent.py kernels/test_translated.py models/test_gemma.py \
	models/test_hidden.py models/test_memory.py models/test_modalities.py models/test_smollm2.py models/test_usage.py \
	passes/test_equivalence.py passes/test_patched.py passes/test_rope.py passes/test_slices.py \
	test_artefacts.py test_caching.py test_foreign.py test_limit.py test_lm_eval.py test_package.py \
	test_replay.py test_stats.py test_unsloth.py)
# what hardly depends on transformers
APART := $(call without,bench cache cli codec docs evaluation kernels models/test_gemma.py models/test_memory.py \
	models/test_smollm2.py passes/test_equivalence.py passes/test_slices.py \
	test_architecture.py test_artefacts.py test_asked.py test_backend.py test_caching.py test_limit.py test_package.py test_replay.py test_tensor.py)

.PHONY: setup demo test test-fast test-full test-5.17 test-2.11 lint types clean
.DELETE_ON_ERROR:

setup: .venv/.stamp

.venv/.stamp: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/python $(PIP) $(TORCH)
	.venv/bin/python $(PIP) -e '.[demo,test]'
	touch $@

# what is in .venv, but for the oldest transformers and what it needs in another version
.venv-5.17/.stamp: .venv/.stamp
	$(PYTHON) -m venv .venv-5.17
	.venv/bin/python -c "import sysconfig; print(f'import site; site.addsitedir({sysconfig.get_path(\"purelib\")!r})')" \
		> $$(.venv-5.17/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/rest.pth
	.venv-5.17/bin/python $(PIP) $(OLDEST)
	touch $@

# threads that wait spin by default: beside other processes a decode step of many small operations took seconds
demo: .venv/.stamp
	OMP_WAIT_POLICY=PASSIVE .venv/bin/spectral-compile demo $(ARGS)

test: .venv/.stamp
	$(ONE_THREAD) .venv/bin/python -m pytest $(PARALLEL) $(PYTEST)

# for the inner loop: the codec, the store, and whether graphs are matched and right
test-fast: .venv/.stamp
	$(ONE_THREAD) .venv/bin/python -m pytest $(PARALLEL) -m "not slow" $(LONG) $(PYTEST)

# all examples and combinations, of which `test` takes some; an issue is resolved when this passes
test-full: .venv/.stamp
	SPECTRAL_TESTS=full $(ONE_THREAD) .venv/bin/python -m pytest $(PARALLEL) $(PYTEST)

# the oldest transformers writes other masks and caches
test-5.17: .venv-5.17/.stamp
	$(ONE_THREAD) .venv-5.17/bin/python -m pytest $(PARALLEL) -m "not slow and not newest" $(APART) $(PYTEST)

# not in .ci/run: the oldest torch fetches three gigabytes of CUDA, also where there is no GPU
.venv-2.11/.stamp: pyproject.toml
	$(PYTHON) -m venv .venv-2.11
	.venv-2.11/bin/python $(PIP) torch==2.11.0 $(OLDEST) 'numpy<2.4' -e '.[demo,test]'
	touch $@

# the torch of many GPU images: what is traced without Dynamo's help it traces otherwise
test-2.11: .venv-2.11/.stamp
	$(ONE_THREAD) .venv-2.11/bin/python -m pytest $(PARALLEL) -m "not slow" $(call without,docs kernels/test_translated.py) $(PYTEST)

lint: types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

# of kernels/ and passes/ mypy knows only through links, where setuptools puts them: inside the package
types: .venv/.stamp
	rm -rf build/types
	mkdir -p build/types/spectral_compile
	ln -s $(addprefix $(CURDIR)/,$(wildcard spectral_compile/*) kernels passes profiles) build/types/spectral_compile/
	cd build/types && $(CURDIR)/.venv/bin/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p spectral_compile

clean:
	rm -rf .venv .venv-5.17 .venv-2.11 .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
