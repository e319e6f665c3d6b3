// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"
)

// defaultNewTokens is SGLang's max_new_tokens.
const defaultNewTokens = 128

// limits are the sampling parameters that may differ within a batch of /generate.
type limits struct {
	maxTokens, minTokens int
	stop                 []string
}

// limitsOf are the limits of q's answer.
func (c *call) limitsOf(q *sequence) limits {
	if i := q.index / c.n; i < len(c.each) {
		return c.each[i]
	}
	return limits{c.maxTokens, c.minTokens, c.stop}
}

// parseNative reads SGLang's own /generate. Of what a list of sampling_params says, only limits differ between the
// prompts; temperature, seed and n are the first one's.
func (e *Engine) parseNative(h http.Header, f *fields) (*call, *apiError) {
	c := &call{
		api: apiNative, n: 1, temperature: 1, logprobs: -1, maxTokens: defaultNewTokens, modelLimit: e.opts.MaxModelLen,
		created: time.Now().Unix(), fields: f, stream: f.boolean("stream"), phase: phasePlain, id: e.hex(16), model: e.opts.Model,
		requestID: h.Get(headerRequestID), attempt: h.Get(headerAttempt), promptLogs: f.boolean("return_logprob"),
	}
	c.logprobStart, _ = f.integer("logprob_start_len")
	if _, ok := f.raw("logprob_start_len"); !ok {
		c.logprobStart = -1
	}
	c.readNativePrompts(f)
	bad := c.readNativeSampling(f)
	if bad == nil {
		c.readRequestIDs(f)
	}
	if f.err != nil {
		bad = f.err
	}
	if bad != nil {
		return c, bad
	}
	for _, t := range c.prompts {
		if len(t) >= c.modelLimit {
			return c, badRequest("", "The input (%d tokens) is longer than the model's context length (%d tokens).", len(t), c.modelLimit)
		}
	}
	return c, nil
}

// readNativePrompts reads text or input_ids, of one prompt or of a batch.
func (c *call) readNativePrompts(f *fields) {
	if v, ok := f.raw("text"); ok {
		var list []json.RawMessage
		c.batch = v[0] == '[' && json.Unmarshal(v, &list) == nil
		if !c.batch {
			list = []json.RawMessage{v}
		}
		for _, one := range list {
			c.addText(f, one)
		}
	}
	if v, ok := f.raw("input_ids"); ok {
		inner := strings.TrimLeft(string(v[1:min(len(v), 64)]), " \t\r\n")
		list := []json.RawMessage{v}
		if v[0] == '[' && strings.HasPrefix(inner, "[") {
			c.batch = json.Unmarshal(v, &list) == nil
		}
		for _, one := range list {
			c.addTokens(f, "input_ids", one)
		}
	}
}

// readNativeSampling reads sampling_params, one object for all prompts or one for each.
func (c *call) readNativeSampling(f *fields) *apiError {
	_, text := f.raw("text")
	if _, ids := f.raw("input_ids"); ids == text {
		return badRequest("", "Either text, input_ids or input_embeds should be provided.")
	}
	if len(c.prompts) == 0 || slices.ContainsFunc(c.prompts, func(t []uint32) bool { return len(t) == 0 }) {
		return badRequest("", "The input is empty.")
	}
	list := []json.RawMessage{json.RawMessage("{}")}
	if v, ok := f.raw("sampling_params"); ok {
		list[0] = v
		if v[0] == '[' && json.Unmarshal(v, &list) == nil && len(list) != len(c.prompts) {
			return badRequest("", "The length of sampling_params should be equal to the batch size.")
		}
	}
	for i, v := range list {
		sub := &fields{}
		if err := json.Unmarshal(v, &sub.m); err != nil {
			return invalid("body.sampling_params", "dict_type", "Input should be a valid dictionary", string(v[:min(len(v), 40)]))
		}
		l, bad := c.nativeLimits(sub, i == 0)
		if bad != nil {
			return bad
		}
		c.each = append(c.each, l)
	}
	if len(list) == 1 { // for all
		c.maxTokens, c.minTokens, c.stop, c.each = c.each[0].maxTokens, c.each[0].minTokens, c.each[0].stop, nil
	}
	return nil
}

// nativeLimits reads one sampling_params object.
func (c *call) nativeLimits(s *fields, first bool) (limits, *apiError) {
	l := limits{maxTokens: defaultNewTokens, stop: s.texts("stop")}
	if n, ok := s.integer("max_new_tokens"); ok {
		l.maxTokens = n
	}
	l.minTokens, _ = s.integer("min_new_tokens")
	n, ok := s.integer("n")
	if !ok {
		n = 1
	}
	if first {
		c.n = n
		if t, ok := s.number("temperature"); ok {
			c.temperature = t
		}
		if seed, ok := s.integer("sampling_seed"); ok {
			c.seed = uint64(seed) //nolint:gosec // any bits will do
		}
	}
	switch {
	case s.err != nil:
		return l, s.err
	case n < 1:
		return l, badRequest("", "n must be at least 1, got %d.", n)
	case n != c.n:
		return l, badRequest("", "The parallel_sample_num should be the same for all samples in sample params.")
	case c.temperature < 0:
		return l, badRequest("", "temperature must be non-negative, got %s.", pythonFloat(c.temperature))
	case l.maxTokens < 0:
		return l, badRequest("", "max_new_tokens must be at least 0, got %d.", l.maxTokens)
	case l.minTokens < 0 || l.minTokens > l.maxTokens:
		return l, badRequest("", "min_new_tokens must be in [0, max_new_tokens(%d)], got %d.", l.maxTokens, l.minTokens)
	}
	l.maxTokens = max(l.maxTokens, 1) // 0 prefills, and the prefill makes a token
	return l, nil
}

// nativeMeta is meta_info, fields in SGLang's order.
type nativeMeta struct {
	ID        string          `json:"id"`
	Finish    json.RawMessage `json:"finish_reason"`
	Prompt    int             `json:"prompt_tokens"`
	Weights   string          `json:"weight_version"`
	Retracted int             `json:"total_retractions"`
	Input     json.RawMessage `json:"input_token_logprobs,omitempty"`
	Output    json.RawMessage `json:"output_token_logprobs,omitempty"`
	Made      int             `json:"completion_tokens"`
	Cached    int             `json:"cached_tokens"`
	Latency   json.RawMessage `json:"e2e_latency,omitempty"`
}

// nativeOut is one answer of /generate, or one event of its stream.
type nativeOut struct {
	Text  string     `json:"text"`
	IDs   []uint32   `json:"output_ids"`
	Meta  nativeMeta `json:"meta_info"`
	Index *int       `json:"index,omitempty"` // of a stream of several
}

// nativeAnswer is what q has so far: its whole text, not the last piece of it.
func (w *writer) nativeAnswer(q *sequence) nativeOut {
	c := w.c
	o := nativeOut{Text: string(q.text), IDs: q.generated, Meta: nativeMeta{
		ID: c.id, Finish: c.nativeFinish(q), Prompt: q.prompt, Weights: "default", Made: len(q.generated), Cached: q.cached,
	}}
	if q.index < len(c.rids) {
		o.Meta.ID = c.rids[q.index]
	}
	if o.IDs == nil {
		o.IDs = []uint32{}
	}
	if c.promptLogs {
		from := q.prompt
		if c.logprobStart >= 0 {
			from = min(c.logprobStart, q.prompt)
		}
		o.Meta.Input, o.Meta.Output = nativeLogprobs(c.prompts[q.index/c.n][from:], from == 0), nativeLogprobs(q.generated, false)
	}
	if c.stream && len(w.g.seqs) > 1 {
		o.Index = &q.index
	}
	if q.finish != "" {
		o.Meta.Latency = marshal(time.Since(w.g.arrived).Seconds())
	}
	return o
}

// nativeFinish is meta_info.finish_reason.
func (c *call) nativeFinish(q *sequence) json.RawMessage {
	switch q.finish {
	case "":
		return json.RawMessage("null")
	case finishLength:
		return json.RawMessage(fmt.Sprintf(`{"type":"length","length":%d}`, c.limitsOf(q).maxTokens))
	case finishStop:
		return json.RawMessage(`{"type":"stop","matched":` + string(marshal(q.stopReason)) + `}`)
	case finishAbort:
		return json.RawMessage(`{"type":"abort","message":"Aborted","status_code":null,"err_type":null}`)
	}
	return json.RawMessage(`{"type":` + string(marshal(q.finish)) + `}`)
}

// nativeLogprobs is a list of [logprob, token id, text]; a prompt's first token has no logprob.
func nativeLogprobs(ids []uint32, first bool) json.RawMessage {
	list := make([][3]any, 0, len(ids))
	for i, id := range ids {
		one := [3]any{logprobOf(id), id, nil}
		if first && i == 0 {
			one[0] = nil
		}
		list = append(list, one)
	}
	return marshal(list)
}

// wholeNative is the answer of /generate: an object for one prompt with one answer, else a list.
func (w *writer) wholeNative() []byte {
	list := make([]nativeOut, 0, len(w.g.seqs))
	for _, q := range w.g.seqs {
		list = append(list, w.nativeAnswer(q))
	}
	if !w.c.batch && len(list) == 1 {
		return marshal(list[0])
	}
	return marshal(list)
}

func (p *process) serveModelInfo(x *exchange) {
	x.json(http.StatusOK, marshal(struct {
		Path       string `json:"model_path"`
		Tokenizer  string `json:"tokenizer_path"`
		Generation bool   `json:"is_generation"`
	}{p.e.opts.Model, p.e.opts.Model, true}))
}
