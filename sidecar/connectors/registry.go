// SPDX-License-Identifier: Apache-2.0

package connectors

import "github.com/baton-epp/baton/inference"

// entry is one line of the registry.
type entry struct {
	connector Connector
	traits    Traits
}

// encoderEntry is one line of the encoders' registry.
type encoderEntry struct {
	encoder Encoder
	traits  EncoderTraits
}

// every is all that can bar a request.
const every = ^inference.Bar(0)

// registry has one line per connector that is built, by the name llm-d gives it where there is one.
func registry() map[string]entry {
	openAI := []inference.API{inference.Chat, inference.Completions, inference.Responses, inference.Messages, inference.Generate}
	return map[string]entry{
		"nixlv2": {nixlv2{}, Traits{Proven: realEngine, Aggregates: true, Claims: true, Bars: every, APIs: openAI}},
	}
}

// encoders has one line per encoder connector that is built, by the name llm-d gives it.
func encoders() map[string]encoderEntry {
	return map[string]encoderEntry{}
}

// How far a wire is proven.
const (
	realEngine  = "real engine" // compared with what a real engine sends and answers
	fromSource  = "from source" // written from the engine's source and documentation
	unconfirmed = "unconfirmed" // from a proposal, or from one router's use of it
)

// planned lists the wires that Baton is going to speak.
func planned() []string {
	return []string{
		"shared-storage", "lmcache-pd", "offloading", "mooncake", "sglang", "trtllm", "moriio",
	}
}
