# wgcni. `make help` lists what there is.

BIN      := .bin
GO       ?= go
VERSION  ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
LDFLAGS  := -s -w -X github.com/wgcni/wgcni/pkg/version.version=$(VERSION)
GOLANGCI := v2.15.0
GOFUMPT  := v0.12.0
FUZZTIME ?= 30s
CHAOSTIME ?= 20m
CHAOSJOBS ?= 1

.DEFAULT_GOAL := help
.PHONY: help deps deps-test build man tools flannel containerd demo test test-kernel matrix chaos lint fmt fuzz bench bench-kernel cover clean

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

deps: ## Install the Debian packages that demo, test and bench need
	@scripts/deps.sh

deps-test: deps ## Install those that test needs beside
	@scripts/deps.sh test

build: ## Build the plugin and the helper into .bin
	@mkdir -p $(BIN)
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/ ./plugins/...

man: ## Write the man pages of wgcnid into .bin/man
	SOURCE_DATE_EPOCH=$${SOURCE_DATE_EPOCH:-$$(git log -1 --format=%ct)} CGO_ENABLED=0 $(GO) run -trimpath -tags man -ldflags '$(LDFLAGS)' ./plugins/wgcnid man $(BIN)/man

tools: ## Build cnitool, the reference plugins, wireguard-go and etcd, as pinned in go.mod
	@mkdir -p $(BIN)
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w' -o $(BIN)/ tool
	cd test/etcd && CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w' -o ../../$(BIN)/etcd go.etcd.io/etcd/server/v3
	cd test/etcd && CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w' -o ../../$(BIN)/ go.etcd.io/etcd/etcdctl/v3 go.etcd.io/etcd/etcdutl/v3

flannel: ## Build flanneld, whose udp backend is C, and flannel's plugin, as pinned in test/flannel
	@mkdir -p $(BIN)
	cd test/flannel && CGO_ENABLED=1 $(GO) build -trimpath -ldflags '-s -w' -o ../../$(BIN)/flanneld github.com/flannel-io/flannel
	cd test/flannel/plugin && CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w' -o ../../../$(BIN)/ github.com/containernetworking/plugins/plugins/meta/flannel

containerd: ## Build containerd 2, as pinned in test/containerd, and what runs in its pods
	@mkdir -p $(BIN)/containerd
	cd test/containerd && CGO_ENABLED=0 $(GO) build -trimpath -tags no_btrfs,no_devmapper,no_rdt,no_tracing,no_zfs,nri_no_wasm -ldflags '-s -w' -o ../../$(BIN)/containerd/ tool ./pause

demo: deps build tools ## Watch pods on three nodes talk encrypted (root; under a minute)
	$(GO) run ./test/demo

test: deps-test build tools flannel containerd ## Run every test (root), with the race detector
	@[ "$$(id -u)" = 0 ] || { echo "make test: run it as root: it makes network namespaces" >&2; exit 1; }
	$(GO) vet ./...
	scripts/test.sh

test-kernel: deps-test build tools flannel ## Run the end-to-end tests on kernels that have WireGuard (root): Linux 7.2, 6.12 and Debian's
	@[ "$$(id -u)" = 0 ] || { echo "make test-kernel: run it as root: it makes network namespaces" >&2; exit 1; }
	@scripts/deps.sh kernel
	scripts/kernel/test.sh

matrix: deps-test build tools flannel ## Test wgcni beside other plugins (root) and rewrite README's tables
	WGCNI_MATRIX=$(CURDIR)/test/e2e/testdata/matrix $(GO) test -count=1 -run '^TestMatrix$$' ./test/e2e
	$(GO) run ./scripts/matrix

chaos: deps build tools ## Run the campaigns (root), each for CHAOSTIME (20m), CHAOSJOBS (1) at once, and rewrite README's table
	@[ "$$(id -u)" = 0 ] || { echo "make chaos: run it as root: it makes network namespaces" >&2; exit 1; }
	scripts/chaos.sh $(CHAOSTIME) $(CHAOSJOBS)

lint: ## Run golangci-lint
	@scripts/golangci-lint.sh $(GOLANGCI) run ./...

fmt: ## Format the code
	$(GO) run mvdan.cc/gofumpt@$(GOFUMPT) -w $$(git ls-files '*.go')

fuzz: ## Run every fuzz target for FUZZTIME (30s)
	@scripts/fuzz.sh $(FUZZTIME)

bench: deps build tools ## Run the benchmarks (root) and print one table with ratios
	@scripts/deps.sh bench
	$(GO) run ./test/bench --plot test/bench/growth.svg

bench-kernel: deps build tools ## Measure throughput with the kernel's WireGuard (root)
	@scripts/deps.sh kernel
	scripts/kernel/bench.sh

cover: deps-test build tools flannel containerd ## Measure test coverage (root)
	$(GO) test -coverpkg=./pkg/...,./plugins/... -coverprofile=$(BIN)/cover.out ./...
	$(GO) tool cover -func=$(BIN)/cover.out | tail -1

clean: ## Remove what was built
	rm -rf $(BIN)
