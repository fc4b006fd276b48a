# Targets of people: build, demo, image, deploy-manifest.
# Of the project: test, test-api, fuzz, bench, bench-api, e2e; and their parts deps, tools, check, check-manifest.

VERSION   ?= 0.1.0
ARCH      ?= amd64
IMAGE     ?= localhost/cnpg-barman-s3:$(VERSION)
NAMESPACE ?= cnpg-system
FUZZTIME  ?= 1m

# The time of every file in the image; the time of the last commit keeps it reproducible.
export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || echo 0)

BINARY  := bin/cnpg-barman-s3
GOBUILD := CGO_ENABLED=0 go build -trimpath -ldflags "-s -w -X main.version=$(VERSION)"

.PHONY: build image deploy-manifest check-manifest test-api bench-api demo test test-versions fuzz e2e bench deps tools check

# The static binary of this machine.
build:
	$(GOBUILD) -o $(BINARY) .

# The container image of linux/ARCH as an archive, made without a container engine.
image:
	GOOS=linux GOARCH=$(ARCH) $(GOBUILD) -o $(BINARY)-linux-$(ARCH) .
	./image.sh $(BINARY)-linux-$(ARCH) $(ARCH) $(IMAGE) bin/image-$(ARCH).tar

# Prints deploy.yaml for another image or the operator's other namespace:
#   make -s deploy-manifest IMAGE=registry.example.com/cnpg-barman-s3:0.1.0 NAMESPACE=postgres
deploy-manifest:
	@cat crd.yaml
	@sed -n '/^# Everything above is crd.yaml/,$$p' deploy.yaml | sed '1i---' \
	  | sed -E 's|localhost/cnpg-barman-s3:[^ ]+|$(IMAGE)|; s|namespace: cnpg-system|namespace: $(NAMESPACE)|'

# Fails when deploy.yaml is not what the target above makes of crd.yaml and VERSION.
check-manifest:
	@$(MAKE) -s --no-print-directory deploy-manifest | diff -u deploy.yaml - || \
	  { echo "deploy.yaml is out of date: make -s deploy-manifest >deploy.new && mv deploy.new deploy.yaml" >&2; exit 1; }

# The control plane against a disposable kube-apiserver with RBAC, named by a kubeconfig
# with the rights of an administrator. CustomResourceDefinitions are installed into it.
test-api: check-manifest
	@test -n "$(TEST_API_KUBECONFIG)" || { echo "set TEST_API_KUBECONFIG to the kubeconfig of a disposable API server" >&2; exit 1; }
	KUBECONFIG_API=$(TEST_API_KUBECONFIG) hack/gotest.sh -count=1 -run '^TestAPI' .

# How long the answers to the operator take, and what they cost, with many Clusters.
bench-api:
	KUBECONFIG_API=$(TEST_API_KUBECONFIG) API_CLUSTERS=500 API_STORES=200 \
	  go test -v -count=1 -run '^(TestAPIManyClusters|TestSidecarStart)$$' . | grep -E '_test.go|^(---|ok|FAIL)'

# Archive, back up, drop a table and get it back: on this machine, without Kubernetes.
demo: build tools
	hack/deps.sh postgres
	hack/demo.sh

# All tests that need no Kubernetes, with what they need.
test: deps build tools check
	hack/gotest.sh -count=1 -timeout 30m ./...

# The core of them with the other major versions of PostgreSQL, from npm.
test-versions: deps tools
	hack/versions.sh

# What strangers can put into bucket and manifests, changed at random, FUZZTIME for each parser.
# Without its limit Go makes the first input that is new to it shorter for a whole minute.
fuzz:
	@mkdir -p bin; targets=$$(go test -list '^Fuzz' . | grep '^Fuzz') || exit 1; for target in $$targets; do \
	  go test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 20x . >bin/fuzz.log || { cat bin/fuzz.log; exit 1; }; \
	  echo "$$target: $$(grep execs: bin/fuzz.log | tail -1)"; \
	done

# The whole thing on the cluster of KUBECONFIG, which runs CloudNativePG, with the
# manifests of examples/. e2e/run.sh says what can be set. The other architecture is only built.
e2e: image
	@$(MAKE) -s --no-print-directory image ARCH=arm64
	e2e/run.sh $(TRACKS)

# The figures of BENCHMARKS.md, side by side with Barman and pgBackRest, on a machine that
# does nothing else: about 20 minutes. hack/bench.sh says what can be set.
bench: build tools bin/sdkalone bin/bench
	hack/deps.sh postgres barman pgbackrest
	hack/bench.sh

# The Debian packages that demo and tests need, where they are missing.
deps:
	hack/deps.sh postgres barman codecs promtool

check: check-manifest
	@unformatted=$$(gofmt -l .); [ -z "$$unformatted" ] || { echo "run gofmt -w $$unformatted" >&2; exit 1; }
	go vet ./...
	go vet -C tools ./socketclient ./sdkalone ./bench

# The programs of demo and tests, from a module of their own: nothing of it is in the binary.
TOOL := CGO_ENABLED=0 go build -C tools -ldflags "-s -w"

tools: bin/versitygw bin/socketclient

bin/versitygw: tools/go.mod
	$(TOOL) -o ../$@ github.com/versity/versitygw/cmd/versitygw

bin/socketclient bin/sdkalone bin/bench: bin/%: tools/go.mod $(wildcard tools/*/*.go)
	$(TOOL) -o ../$@ ./$*
