// SPDX-License-Identifier: Apache-2.0

package connectors

import "github.com/baton-epp/baton/inference"

// entry is one line of the registry.
type entry struct {
	connector Connector
	traits    Traits
}

// registry has one line per connector that is built, by the name llm-d gives it.
func registry() map[string]entry {
	return map[string]entry{
		"nixlv2": {nixlv2{}, Traits{Proven: "real engine", Shape: Serial, Aggregates: true, APIs: []inference.API{
			inference.Chat, inference.Completions, inference.Responses, inference.Messages, inference.Generate,
		}}},
	}
}

// planned lists the wires that Baton is going to speak.
func planned() []string {
	return []string{
		"shared-storage", "lmcache-pd", "offloading", "mooncake", "sglang", "trtllm", "moriio", "ec-example", "ec-nixl",
	}
}
