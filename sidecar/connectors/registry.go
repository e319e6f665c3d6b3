// SPDX-License-Identifier: Apache-2.0

package connectors

import (
	"slices"

	"github.com/baton-epp/baton/inference"
)

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
	withSGLang := append(slices.Clone(openAI), inference.SGLangGenerate)
	trtllmAPIs := []inference.API{inference.Chat, inference.Completions}
	howTokensAreDrawn := inference.BarBestOf | inference.BarBeamSearch
	sglangAPIs := []inference.API{inference.Chat, inference.Completions, inference.SGLangGenerate}
	// Echo with logprobs needs those of the prompt, which decode does not have. The other bars are vLLM's fields, which
	// SGLang ignores, or of APIs that are not served; several prompts get a room each.
	sglangBars := inference.BarEcho | inference.BarEmbeddings | inference.BarNotJSON
	vllm, sgl, trt := []string{"vllm"}, []string{"sglang"}, []string{"trtllm-serve", "triton-tensorrt-llm"}
	withoutTRT := slices.Concat(vllm, sgl)
	return map[string]entry{
		"nixlv2":         {nixlv2{}, Traits{Engines: vllm, Proven: realEngine, Aggregates: true, Claims: true, Bars: every, APIs: openAI}},
		"shared-storage": {sharedStorage{}, Traits{Engines: withoutTRT, Proven: fromSource, Aggregates: true, Bars: every &^ howTokensAreDrawn, APIs: withSGLang}},
		"offloading":     {offloading{}, Traits{Engines: vllm, Proven: fromSource, Overlaps: true, Aggregates: true, Claims: true, OneChoice: true, Bars: every, APIs: openAI}},
		"moriio":         {moriio{}, Traits{Engines: vllm, Proven: unconfirmed, Aggregates: true, Claims: true, OneChoice: true, Bars: every, APIs: openAI}},
		"trtllm":         {trtllm{}, Traits{Engines: trt, Proven: fromSource, Aggregates: true, Claims: true, OneChoice: true, Bars: every, APIs: trtllmAPIs}},
		"mooncake":       {mooncake{}, Traits{Engines: vllm, Proven: fromSource, Shape: Rendezvous, Aggregates: true, Claims: true, EndsDecode: true, OneChoice: true, Bars: every, APIs: openAI}},
		"sglang":         {sglang{}, Traits{Engines: sgl, Proven: fromSource, Shape: Rendezvous, Claims: true, EndsDecode: true, OneChoice: true, Bars: sglangBars, APIs: sglangAPIs}},
		"lmcache-pd":     {lmcachePD{}, Traits{Engines: vllm, Proven: unconfirmed, NeedsDecode: true, Aggregates: true, Claims: true, Bars: every, APIs: openAI}},
	}
}

// Engines lists every engine type that speaks some wire.
func Engines() []string {
	var all []string
	for _, e := range registry() {
		all = append(all, e.traits.Engines...)
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// encoders has one line per encoder connector that is built, by the name llm-d gives it.
func encoders() map[string]encoderEntry {
	withImages := []inference.API{inference.Chat, inference.Responses, inference.Messages}
	return map[string]encoderEntry{
		"ec-example": {ecExample{}, EncoderTraits{Proven: fromSource, APIs: withImages}},
		// Handles go into chat bodies: of other APIs no engine is known to read ec_transfer_params.
		"ec-nixl": {ecNixl{}, EncoderTraits{Proven: unconfirmed, APIs: withImages[:1]}},
	}
}

// How far a wire is proven.
const (
	realEngine  = "real engine" // compared with what a real engine sends and answers
	fromSource  = "from source" // written from the engine's source and documentation
	unconfirmed = "unconfirmed" // from a proposal, or from one router's use of it
)
