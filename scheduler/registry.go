// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/baton-epp/baton/config"
)

// Constructor makes one configured plugin: it decodes the parameters over its defaults and checks them. What it returns
// is a Filter, Scorer, Picker, Decider or several of them, a profile handler or producer of this package, or a plain
// value that only [Plugins] finds. Optional interface: [Learner].
type Constructor func(b *Builder, p config.Parameters) (any, error)

// Registry maps plugin types, llm-d's names where the meaning is equal, to their constructors.
type Registry map[string]Constructor

// Builtin lists the plugin types of this package: profile handlers, deciders, producers, and types that llm-d's files
// carry whose work Baton does elsewhere.
func Builtin() Registry {
	return Registry{
		"single-profile-handler": newSingleHandler,
		"disagg-profile-handler": newDisaggHandler,
		"pd-profile-handler":     newPDHandler,

		"prefix-based-pd-decider":          newPrefixDecider,
		"always-disagg-pd-decider":         newAlwaysDecider,
		"cost-pd-decider":                  newCostDecider,
		"always-disagg-multimodal-decider": newMultimodalDecider,

		typePrefixProducer:   newPrefixProducer,
		typeInflightProducer: newInflightProducer,
		"token-producer":     newTokenProducer,
		"tokenizer":          Deprecated(newTokenProducer, "use token-producer"),

		"metrics-data-source":          newElsewhere,
		"core-metrics-extractor":       newElsewhere,
		"file-discovery":               newElsewhere,
		"endpoint-notification-source": newUnparametrised,

		"openai-parser":      newUnparametrised,
		"anthropic-parser":   newUnparametrised,
		"vllmhttp-parser":    newUnparametrised,
		"sglanghttp-parser":  newUnparametrised,
		"passthrough-parser": newUnparametrised,

		"disagg-headers-handler": Deprecated(newHeadersHandler, "the headers are always set"),
		"prefill-header-handler": Deprecated(newHeadersHandler, "the headers are always set"),

		"utilization-detector":          newUtilizationDetector,
		"fcfs-ordering-policy":          newUnparametrised,
		"global-strict-fairness-policy": newUnparametrised,
		"static-usage-limit-policy":     newUsageLimit,
	}
}

// NotBuilt lists the plugin types that llm-d knows and Baton does not have yet; they are refused by name.
func NotBuilt() []string {
	return []string{
		"agent-identity", "burst-prefix-cache-producer", "concurrency-detector", "context-length-aware",
		"data-parallel-profile-handler", "dcgm-data-source", "dcgm-extractor", "destination-endpoint-served-verifier",
		"disaggregatedset-rollout-screener", "edf-ordering-policy", "endpoint-attribute-filter", "endpoint-attribute-scorer",
		"header-based-testing-filter", "header-label-affinity-scorer", "header-profile-handler", "k8s-notification-source",
		"latency-scorer", "latency-slo-admitter", "local-syncer", "mm-embeddings-cache-producer", "mm-embeddings-cache-scorer",
		"models-data-extractor", "models-data-source", "multicluster-approx-prefix-cache-producer",
		"multicluster-file-discovery", "multicluster-kv-cache-utilization-scorer", "multicluster-metrics-data-source",
		"multicluster-metrics-extractor", "multicluster-prefix-cache-scorer", "multicluster-queue-scorer",
		"multicluster-session-affinity-filter", "no-hit-lru-scorer", "p2p-source-producer", "precise-prefix-cache-producer",
		"precise-prefix-cache-scorer", "predicted-latency-producer", "prefix-cache-affinity-filter",
		"priority-holdback-policy", "priority-then-time-eviction-order-policy", "probabilistic-admitter",
		"program-aware-fairness", "request-attribute-reporter", "round-robin-fairness-policy", "session-affinity-filter",
		"session-id-producer", "sheddable-eviction-filter", "slo-deadline-ordering-policy", "slo-headroom-tier-filter",
		"soft-reflective-ceiling-policy", "topology-affinity-filter", "topology-affinity-scorer", "topology-extractor",
		"utilization-filter", "vertexai-parser", "vllmgrpc-parser",
	}
}

// Merge joins registries; a type in two of them is an error.
func Merge(registries ...Registry) (Registry, error) {
	out := Registry{}
	for _, r := range registries {
		for _, name := range slices.Sorted(maps.Keys(r)) {
			if _, taken := out[name]; taken {
				return nil, fmt.Errorf("plugin type %q is registered twice", name)
			}
			out[name] = r[name]
		}
	}
	return out, nil
}

// unknown says why there is no constructor for a type.
func (r Registry) unknown(kind string) string {
	notBuilt := NotBuilt()
	if slices.Contains(notBuilt, kind) {
		return fmt.Sprintf("%q is known to llm-d, not built in Baton yet", kind)
	}
	best, bestDistance := "", max(2, len(kind)/3)+1
	for _, name := range slices.Concat(slices.Sorted(maps.Keys(r)), notBuilt) {
		if d := distance(kind, name); d < bestDistance {
			best, bestDistance = name, d
		}
	}
	if best == "" {
		return fmt.Sprintf("unknown plugin type %q, known: %s", kind, strings.Join(slices.Sorted(maps.Keys(r)), ", "))
	}
	return fmt.Sprintf("unknown plugin type %q, did you mean %q?", kind, best)
}

// distance is the number of single-character edits between a and b.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := 1; i <= len(a); i++ {
		diagonal := row[0]
		row[0] = i
		for j := 1; j <= len(b); j++ {
			change := diagonal
			if a[i-1] != b[j-1] {
				change++
			}
			diagonal = row[j]
			row[j] = min(change, row[j]+1, row[j-1]+1)
		}
	}
	return row[len(b)]
}
