// SPDX-License-Identifier: Apache-2.0

package connectors

import (
	"encoding/json"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/baton-epp/baton/inference"
)

// trtllmField is where TensorRT-LLM reads what belongs to disaggregation, and in which object of the handle it is kept.
const trtllmField = "disaggregated_params"

// tokensField is the prompt as the context server tokenized it, in its answer, the handle and a chat's body.
const tokensField = "prompt_token_ids"

// trtllm is TensorRT-LLM's disaggregated serving, context first: a context server computes the prompt and draws the
// first token, a generation server takes over from there. What it needs is in the answer's only choice. Unlike with
// vLLM, the first token is not thrown away but becomes the client's, which is why the client's sampling parameters and
// limits go to the context server as they are: it ends by itself after the prompt. A limit of one token would cost
// min_tokens, and the first token could end the answer. schedule_style is not sent: context first is the default, and
// releases that do not know the field refuse it.
//
// A handle is {"disaggregated_params":…,"prompt_token_ids":…}, cut from the answer. Numbers in it pass as bytes: ids go
// up to 2^63. The answer lists the prompt's tokens: prompts of more than about 100,000 need a larger
// prefill.maxResponseBytes than the default.
type trtllm struct{}

func (trtllm) Prefill(x *Exchange, body *inference.Edits) {
	body.Set("stream", []byte("false"))
	body.Remove("stream_options")
	if x.Request.N > 1 {
		body.Set("n", []byte("1")) // see Answer
	}
	x.Ticket = strconv.FormatInt(newSnowflake(time.Now()), 10)
	body.Set(trtllmField, []byte(`{"request_type":"context_only","disagg_request_id":`+x.Ticket+`}`))
}

// Answer says [Complete] for a request whose answer ended with the first token, although the context server has said
// all there is to say: the client's answer always comes from decode, which computes it anew. The same goes for more
// than one choice, of which a context server can hand over none (Traits.OneChoice keeps these away).
func (trtllm) Answer(x *Exchange, answer []byte) Answer {
	r, settled := read(answer)
	if settled {
		return r.Answer
	}
	if x.Request.N > 1 || r.finish != "" && r.finish != "length" && r.finish != "not_finished" {
		r.Verdict = Complete
		return r.Answer
	}
	choice, only := onlyElement(r.member(answerChoices))
	var found [1]inference.Span
	if only && choice[0] == '{' {
		members(choice, []string{trtllmField}, found[:])
	}
	params := choice[found[0].Start:found[0].End]
	switch {
	case !isThere(params):
		r.Verdict = Missing
		return r.Answer
	case params[0] != '{':
		r.Verdict = Incomplete
		return r.Answer
	}
	tokens := r.member(answerTokenIDs)
	if !areTokenIDs(tokens) {
		tokens = nil // the generation server tokenizes the same prompt
	}
	params, ok := generationOnly(params, r.member(answerUsage))
	if !ok {
		r.Verdict = Incomplete
		return r.Answer
	}
	handle := withMember(nil, trtllmField, params)
	if tokens != nil {
		handle = withMember(handle, tokensField, tokens)
	}
	if !json.Valid(handle) { // Python's NaN is no JSON
		r.Verdict = Incomplete
		return r.Answer
	}
	r.Handle = handle
	return r.Answer
}

// generationOnly returns a copy of the parameters that a context server answered, for a generation server: request_type
// replaced, and ctx_usage filled in where the server knows it, for others refuse the field. It is false when they lack
// what the generation server cannot do without.
func generationOnly(params, usage []byte) ([]byte, bool) {
	const (
		requestType = iota
		ctxUsage
		ctxRequestID
		disaggRequestID
		firstGenTokens
		count
	)
	var found [count]inference.Span
	members(params, []string{"request_type", "ctx_usage", "ctx_request_id", "disagg_request_id", "first_gen_tokens"}, found[:])
	if !isText(text(params, found[requestType])) || natural(text(params, found[ctxRequestID])) < 0 ||
		natural(text(params, found[disaggRequestID])) < 0 || !areTokenIDs(params[found[firstGenTokens].Start:found[firstGenTokens].End]) {
		return nil, false
	}
	type change struct {
		inference.Span
		value []byte
	}
	changes := []change{{found[requestType], []byte(`"generation_only"`)}}
	if found[ctxUsage].Len() > 0 && len(usage) > 0 && usage[0] == '{' {
		changes = append(changes, change{found[ctxUsage], usage})
	}
	slices.SortFunc(changes, func(a, b change) int { return a.Start - b.Start })
	out, done := make([]byte, 0, len(params)+len(usage)+8), 0
	for _, c := range changes {
		out = append(append(out, params[done:c.Start]...), c.value...)
		done = c.End
	}
	return append(out, params[done:]...), true
}

// areTokenIDs reports whether a JSON value is a list of numbers that is not empty.
func areTokenIDs(value []byte) bool {
	v := string(value)
	return areBlockIDs(v) && strings.Count(v, "[") == 1 && strings.ContainsAny(v, "0123456789")
}

func (trtllm) Decode(x *Exchange, handle []byte, body *inference.Edits) {
	var found [2]inference.Span
	if len(handle) == 0 {
		return
	}
	members(handle, []string{trtllmField, tokensField}, found[:])
	body.Set(trtllmField, handle[found[0].Start:found[0].End])
	if found[1].Len() > 0 {
		body.Set(promptField(x.Request), handle[found[1].Start:found[1].End])
	}
}

func (trtllm) Withdraw(x *Exchange, body *inference.Edits) {
	body.Restore(trtllmField)
	body.Restore(promptField(x.Request))
}

// promptField is where a generation server takes token ids that replace the prompt's text.
func promptField(r *inference.Request) string {
	if r.API == inference.Completions {
		return "prompt"
	}
	return tokensField
}
