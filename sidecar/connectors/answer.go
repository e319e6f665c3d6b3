// SPDX-License-Identifier: Apache-2.0

package connectors

import (
	"bytes"
	"strconv"

	"github.com/baton-epp/baton/inference"
)

// The members of an answer that connectors read, as indexes of [reading].
const (
	answerTransfer = iota
	answerChoices
	answerUsage
	answerTokenIDs
	answerError
	answerObject
	answerMembers
)

// A reading is a prefill's answer after the look that is the same for every wire.
type reading struct {
	Answer
	object []byte // the answer, valid JSON, without space around it; a slice of what was read
	found  [answerMembers]inference.Span
	finish string // the finish reason, in the API's words
}

// read checks that answer is one JSON object that reports no error. Where it is not, or does, the verdict is final
// (settled); otherwise it is still [Ready].
func read(answer []byte) (r reading, settled bool) {
	r.CachedTokens = -1
	if _, _, err := inference.Field(answer, ""); err != nil {
		r.Verdict = Malformed
		return r, true
	}
	r.object = bytes.TrimSpace(answer)
	members(r.object, []string{transferField, "choices", "usage", "prompt_token_ids", "error", "object"}, r.found[:])
	var scanner inference.UsageScanner
	scanner.Feed(r.object)
	usage := scanner.Usage()
	r.finish = usage.FinishReason
	r.PromptTokens = usage.PromptTokens
	r.CachedTokens = cachedTokens(r.member(answerUsage))
	if usage.CachedTokens > 0 {
		r.CachedTokens = usage.CachedTokens // wherever the API says it
	}
	// Engines report errors in a 200, too: as the error object of their API, or as finish reason.
	if gaveUp(r.finish) || startsWith(r.object, r.found[answerError], '{') || text(r.object, r.found[answerObject]) == `"error"` {
		r.Verdict = Failed
		return r, true
	}
	return r, false
}

// gaveUp reports whether a finish reason says that the engine did not do what it was asked for: error and abort are
// vLLM's and SGLang's words, timeout and cancelled TensorRT-LLM's, failed and cancelled those of Responses.
func gaveUp(finish string) bool {
	switch finish {
	case "error", "abort", "timeout", "cancelled", "failed":
		return true
	}
	return false
}

// endedByItself reports whether a finish reason says that generation ended with the first token, and not at its limit.
func endedByItself(finish string) bool {
	switch finish {
	case "stop", "end_turn", "stop_sequence", "tool_calls", "tool_use", "completed":
		return true
	}
	return false
}

// member returns the raw value of a member of the answer, nil when it is not there.
func (r *reading) member(i int) []byte {
	return r.object[r.found[i].Start:r.found[i].End:r.found[i].End]
}

// isThere tells a value from one that is absent or null.
func isThere(raw []byte) bool { return len(raw) > 0 && raw[0] != 'n' }

// cachedTokens reads how many of the prompt's tokens were found in the prefix cache out of an answer's usage, as the
// OpenAI or the Anthropic API says it; -1 when it does not say.
func cachedTokens(usage []byte) int64 {
	if len(usage) == 0 || usage[0] != '{' {
		return -1
	}
	var found [3]inference.Span
	members(usage, []string{"prompt_tokens_details", "input_tokens_details", "cache_read_input_tokens"}, found[:])
	for _, details := range found[:2] {
		if startsWith(usage, details, '{') {
			var cached [1]inference.Span
			members(usage[details.Start:details.End], []string{"cached_tokens"}, cached[:])
			cached[0].Start += details.Start
			cached[0].End += details.Start
			if n := natural(text(usage, cached[0])); n >= 0 {
				return n
			}
		}
	}
	return natural(text(usage, found[2]))
}

// natural reads a number of tokens; -1 when raw is none.
func natural(raw string) int64 {
	if n, err := strconv.ParseUint(raw, 10, 63); err == nil {
		return int64(n)
	}
	return -1
}

// onlyElement returns the element of a valid JSON array that has exactly one.
func onlyElement(array []byte) ([]byte, bool) {
	if len(array) == 0 || array[0] != '[' {
		return nil, false
	}
	inside := bytes.TrimSpace(array[1 : len(array)-1])
	if len(inside) == 0 {
		return nil, false
	}
	end := valueEnd(inside, 0)
	return inside[:end:end], end == len(inside)
}
