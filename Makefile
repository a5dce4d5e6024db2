# make quickstart   environment, training under DeepSpeed on the shipped data, tables and pictures
# make test         environment and all tests
# make durations    the same, and tests/durations.json anew
# make soak         runs killed fifty times and more, long fuzzing (an hour and more)
# make gpu-check    what needs one GPU, in less than five minutes, and a table for a bug report
# make lint         ruff
# make family       every method on the shipped data, three seeds, and their table (hours; what is
#                   done is not done again)
# make claims       the paper's claims on data of Debian and npm: docs/claims.md (hours; any part alone
#                   by STUDIES=batch_size, on a GPU SET=deepspeed=ds_configs/zero1_bf16.json)
# make bench        ratios against named peers, into benchmarks/results/ and docs/benchmarks.md
#                   (an hour and more)

PYTHON ?= python3
RANKS ?= 2
RUN := runs/quickstart
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(shell cat requirements.txt requirements-dev.txt | sha256sum | cut -c1-16)
RUNS := unicl labels captions

# One thread per rank; no tool may look for a model or a data set on the network.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1
export HF_DATASETS_OFFLINE ?= 1
export NO_ALBUMENTATIONS_UPDATE ?= 1
export PYTHONUNBUFFERED ?= 1

# A step on a CPU frees and takes the same large tensors again. Unless told not to, glibc hands them
# back to the kernel each time and gets pages that have to be cleared first. No number changes.
quickstart family claims: export MALLOC_MMAP_MAX_ ?= 0
quickstart family claims: export MALLOC_TRIM_THRESHOLD_ ?= 100000000000
quickstart family claims: export MALLOC_TOP_PAD_ ?= 268435456

.PHONY: quickstart test durations soak gpu-check lint family claims bench
BENCHES := loss methods filip loss_ranks loader size step scaling_model gpu_loss gpu_step gpu_end_to_end data_prep evaluation

$(STAMP): requirements.txt requirements-dev.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@rm -f $(VENV)/.installed-*
	@touch $@

quickstart: $(STAMP)
	@for run in $(RUNS); do \
	  $(BIN)/torchrun --standalone --nproc_per_node $(RANKS) \
	    train.py --config configs/quickstart_$$run.yaml || exit $$?; \
	done
	$(BIN)/python -m eval.zero_shot --checkpoint $(RUNS:%=$(RUN)/%) --datasets quickstart --output $(RUN)/results
	$(BIN)/python -m eval.linear_probe --checkpoint $(RUNS:%=$(RUN)/%) --datasets quickstart --output $(RUN)/results
	$(BIN)/python -m eval.retrieval --checkpoint $(RUNS:%=$(RUN)/%) --datasets quickstart --output $(RUN)/results
	$(BIN)/python -m eval.plots --runs $(RUNS:%=$(RUN)/%) --results $(RUN)/results --output $(RUN)/report
	$(BIN)/python -m eval.tables $(RUN)/results
	@echo "Everything on one page, for a browser: $(CURDIR)/$(RUN)/report/index.html"

# More workers than the two cores of a runner, since long tests wait: for servers, time-outs, SLURM.
WORKERS ?= 3

test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS)

# The same, and the time of every test file into tests/durations.json, by which they are dealt out.
durations: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --store-durations

# Hundreds of killed runs and long fuzzing: what is marked soak.
soak: $(STAMP)
	$(BIN)/python -m pytest -m soak

# Without the environment of this file: python -m tests.gpu
gpu-check: $(STAMP)
	$(BIN)/python -m tests.gpu

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Open Clip Art with the titles of the drawings, for configs/quickstart_alip.yaml.
TITLES := data/quickstart_titles
OPENCLIPART := data/quickstart/openclipart_train

$(TITLES)/manifest.json: $(STAMP)
	$(BIN)/python data_prep/annotate.py $(OPENCLIPART) --table $(OPENCLIPART)/provenance.tsv \
	  --columns title=title --out $(TITLES)
	$(BIN)/python data_prep/verify.py $(TITLES)

# What configs/quickstart_raclip.yaml looks up: a shard that it is not trained on, as the towers of
# the CLIP run see it.
REFERENCE := data/quickstart_reference

$(REFERENCE)/reference.json: | $(STAMP)
	$(BIN)/torchrun --standalone --nproc_per_node $(RANKS) train.py --config configs/quickstart_clip.yaml
	$(BIN)/python -m eval.reference --data $(OPENCLIPART)/shards/00000.tar \
	  --encoder $(RUN)/clip --text-encoder $(RUN)/clip --output $(REFERENCE)

# The report also where cells have failed; the exit code is that of the trainings.
family: $(STAMP) $(TITLES)/manifest.json $(REFERENCE)/reference.json
	@code=0; \
	$(BIN)/python -m studies.run studies/family.yaml \
	  --launcher "torchrun --standalone --nproc_per_node $(RANKS)" || code=$$?; \
	$(BIN)/python -m studies.report studies/family.yaml && exit $$code

CLAIMS := data/claims
CIFAR10 := $(wildcard data/eval/cifar-10/train/manifest.json)
STUDIES ?= claims batch_size $(if $(CIFAR10),cifar10)
CHANGES := $(if $(SET),--set $(SET))

$(CLAIMS)/report.json: | $(STAMP)
	$(BIN)/python data_prep/claims.py --out $(CLAIMS)

# Two lanes share out the cells of a study. The report also where cells have failed.
claims: $(STAMP) $(CLAIMS)/report.json
	@code=0; for study in $(STUDIES); do \
	  $(BIN)/python -m studies.run studies/$$study.yaml $(CHANGES) > /dev/null 2>&1 & lane=$$!; \
	  $(BIN)/python -m studies.run studies/$$study.yaml $(CHANGES) || code=$$?; \
	  wait $$lane || code=$$?; \
	  $(BIN)/python -m studies.report studies/$$study.yaml $(CHANGES) || code=$$?; \
	done; exit $$code

bench: $(STAMP)
	@for name in $(BENCHES); do $(BIN)/python -m benchmarks.$$name || exit $$?; done
	$(BIN)/python -m benchmarks.table
