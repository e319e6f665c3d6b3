SHELL       := bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS   += --no-print-directory
.DEFAULT_GOAL := help

GO       ?= go
DOCKER   ?= docker
IMAGE    ?= baton:latest
VERSION  ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
FUZZTIME ?= 30s
# How long make soak runs, all wires together.
SOAK     ?= 3m
# Further flags of go test, for example: make test TESTFLAGS='-run Envoy -v' PKG=./extproc
TESTFLAGS ?=
PKG       ?= ./...
# Flags of the load comparison of make bench; see go run ./bench -help.
BENCHFLAGS ?=

# Built tools are kept under a name that changes when their pinned versions do.
TOOLS     := .cache/bin
TOOLS_SUM := $(shell cksum < tools.mod | cut -d' ' -f1)
LINT      := $(TOOLS)/golangci-lint-$(TOOLS_SUM)
SUMMARY   := $(TOOLS)/testsummary

.PHONY: help
help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: build
build: ## build the static binary bin/baton
	@echo "Building bin/baton $(VERSION) (the first build takes a minute or two) ..."
	@CGO_ENABLED=0 $(GO) build -buildvcs=false -trimpath -ldflags '-X main.version=$(VERSION)' -o bin/baton ./cmd/baton

.PHONY: demo
demo: ## run Envoy, Baton and simulated model servers, and watch requests go through
	@./scripts/demo.sh

.PHONY: demo-vllm
demo-vllm: ## the demo on two real vLLM servers on the CPU (downloads some gigabytes)
	@./scripts/demo-vllm.sh

.PHONY: check
check: build $(LINT) ## format, lint, vet, floors, docs, modernizers, go.mod, static binary
	@echo "Checking that bin/baton is static ..."
	@$(GO) run ./internal/elfcheck bin/baton
	@echo "Checking go.mod and go.sum ..."
	@$(GO) mod tidy -diff
	@echo "Vetting ..."
	@$(GO) vet ./...
	@echo "Checking for old idioms ..."
	@$(GO) fix -diff ./...
	@echo "Checking format and linting ..."
	@$(LINT) run ./...
	@echo "Checking floors, file sizes, documents, metrics and shipped configurations ..."
	@$(GO) test -count=1 -run '^Test(Floors|File|Metric)' ./app
	@$(GO) test -count=1 -run '^TestDocs' ./scheduler
	@$(GO) test -count=1 ./docs ./manifests/...
	@echo "All checks passed."

.PHONY: lint
lint: $(LINT) ## format check and linters alone; PKG=./scheduler/... narrows it
	@$(LINT) run $(PKG)

.PHONY: fmt
fmt: $(LINT) ## rewrite the sources in the house format
	@$(LINT) fmt

.PHONY: test
test: cc $(SUMMARY) ## every test, with the race detector and a real Envoy
	@envoy=$$(./scripts/envoy.sh); \
	echo "Building and running the tests with the race detector (several minutes on two cores) ..."; \
	{ BATON_ENVOY="$$envoy" CGO_ENABLED=1 $(GO) test -race -json -timeout 20m $(TESTFLAGS) $(PKG) || true; \
	  echo "Allocation ceilings, without the race detector, which allocates ..." >&2; \
	  $(GO) test -json -run 'Alloc' $(PKG) || true; } | $(SUMMARY)

.PHONY: soak
soak: cc $(SUMMARY) ## thousands of requests while model servers die, hang and answer wrongly; SOAK (3m) is how long
	@echo "Soaking every wire for $(SOAK) in all, with the race detector ..."
	@{ BATON_SOAK=$(SOAK) CGO_ENABLED=1 $(GO) test -race -json -count=1 -timeout 60m -run '^TestSoak$$' ./app || true; } | $(SUMMARY)

# The race detector links against the C library.
.PHONY: cc
cc:
	@echo '#include <stdlib.h>' | $$($(GO) env CC) -E -xc - >/dev/null 2>&1 || \
	  { echo "The race detector needs a C compiler and its headers: install the packages gcc and libc6-dev (Debian, Ubuntu), or gcc and glibc-devel (Fedora)." >&2; exit 1; }

.PHONY: fuzz
fuzz: ## fuzz each target for FUZZTIME (30s)
	@./scripts/fuzz.sh $(FUZZTIME)

.PHONY: bench
bench: build ## CPU, latency and memory against the no-op ext_proc floor, then the benchmarks
	@echo "Comparing Baton with a no-op ext_proc server under load (some minutes; keep the machine quiet) ..."
	@$(GO) run ./bench $(BENCHFLAGS)
	@echo "Measuring what orchestration costs ..."
	@$(GO) run ./bench orchestrate
	@echo "Running the benchmarks of the packages ..."
	@$(GO) test -run '^$$' -bench . -benchmem ./...

.PHONY: golden
golden: ## rewrite the golden files in testdata; review the diff
	@$(GO) test -count=1 $$(grep -rlE --include='*_test.go' --exclude-dir='.?*' 'flag\.Bool\("update"' . | xargs -n1 dirname | sort -u) -update

.PHONY: image
image: ## build the container image IMAGE (baton:latest)
	@$(DOCKER) build --build-arg VERSION=$(VERSION) -t $(IMAGE) .

.PHONY: clean
clean: ## remove what was built; downloads and tools in .cache stay
	@rm -rf bin

$(LINT):
	@echo "Building golangci-lint (once per version; some minutes on two cores) ..."
	@mkdir -p $(TOOLS)
	@CGO_ENABLED=0 $(GO) build -buildvcs=false -modfile=tools.mod -o $@ github.com/golangci/golangci-lint/v2/cmd/golangci-lint

.PHONY: $(SUMMARY)
$(SUMMARY):
	@mkdir -p $(TOOLS)
	@$(GO) build -buildvcs=false -o $@ ./internal/testsummary
