// SPDX-License-Identifier: Apache-2.0

package connectors

import (
	"bytes"

	"github.com/baton-epp/baton/inference"
)

// thresholdField asks vLLM to compute a prompt only if that part of it is cached: otherwise it ends the answer at once
// with finish reason cacheThreshold.
const (
	thresholdField = "cache_hit_threshold"
	cacheThreshold = "cache_threshold"
)

// sharedStorage is every set-up in which the engines meet in a store that neither leg names: vLLM's shared storage and
// store connectors, LMCache as a cache, object stores. Serial and blind: prefill puts the prompt's blocks into the
// store, keyed by content, and decode looks there by itself. So there is no handle that could be wrong or used twice,
// and a prefill whose blocks are gone again costs time only.
//
// A client that sends cache_hit_threshold lets the decode endpoint say whether prefill is worthwhile (llm-d's
// try-decode-first): [sharedStorage.Ask] puts the question, with the client's threshold, and every leg after it carries
// the threshold 0, for then the prompt is to be computed whatever is cached.
//
// Its bars are those of [nixlv2] but for best_of and beam search, which say how tokens are drawn: a prompt's blocks do
// not depend on it, and decode's body is the client's. What stays: echo and prompt_logprobs, since no engine has the
// logits of tokens whose blocks it loaded; truncation of any kind, as what is cut off may depend on the leg's token
// limit, and the blocks would be those of another prompt; previous_response_id, which only one engine knows; and
// several prompts, of which one answer says too little.
type sharedStorage struct{}

func (sharedStorage) Prefill(x *Exchange, body *inference.Edits) {
	OneToken(x.Request, body)
	computeAll(x.Request, body)
}

// Answer does not look at the answer except for errors. SGLang answers a list of prompts, even of one, with a list.
func (sharedStorage) Answer(x *Exchange, answer []byte) Answer {
	if x.Request.API == inference.SGLangGenerate {
		return sglang{}.Answer(x, answer)
	}
	r, _ := read(answer)
	return r.Answer
}

func (sharedStorage) Decode(x *Exchange, _ []byte, body *inference.Edits) {
	computeAll(x.Request, body)
}

// Withdraw has nothing to take back. The threshold stays 0, or decode would refuse to compute.
func (sharedStorage) Withdraw(x *Exchange, body *inference.Edits) { computeAll(x.Request, body) }

func (sharedStorage) Ask(x *Exchange, body *inference.Edits) bool {
	if !hasThreshold(x.Request) {
		return false
	}
	OneToken(x.Request, body)
	return true
}

func (sharedStorage) Enough(_ *Exchange, answer []byte) bool {
	r, settled := read(answer)
	return !settled && r.finish != "" && r.finish != cacheThreshold
}

// computeAll sets the threshold 0 where the client sent one.
func computeAll(r *inference.Request, body *inference.Edits) {
	if hasThreshold(r) {
		body.Set(thresholdField, []byte("0"))
	}
}

// hasThreshold reports whether the client sent a threshold. The body is copied only for those who sent the field.
func hasThreshold(r *inference.Request) bool {
	if !hasField(r, thresholdField) {
		return false
	}
	value, _, err := inference.Field(bytes.Join(r.Body.Chunks, nil), thresholdField)
	return err == nil && isThere(value)
}
