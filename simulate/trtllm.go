// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"net/http"
	"slices"
	"strconv"
)

// Values of disaggregated_params.request_type.
const (
	trtContext    = "context_only"
	trtGeneration = "generation_only"
	trtBoth       = "context_and_generation"
)

// firstGlobalID is the lowest disagg_request_id: those below are a server's own.
const firstGlobalID = 1 << 42

// trtWire is TensorRT-LLM's disaggregation: the context leg answers parameters, which the generation leg gets with
// another request_type. Any server plays both parts, and serves whole requests without parameters.
type trtWire struct{ p *process }

func newTRTLLM(p *process) wire { return &trtWire{p} }

func (w *trtWire) stop() {}

// trtParams is disaggregated_params. Integers stay text where a float would lose digits.
type trtParams struct {
	Type      string      `json:"request_type"`
	First     []uint32    `json:"first_gen_tokens"`
	Context   json.Number `json:"ctx_request_id"`
	State     *string     `json:"encoded_opaque_state"`
	RequestID json.Number `json:"disagg_request_id"`

	members map[string]json.RawMessage // all of them, as they came
}

// trtAnswer is disaggregated_params of a context leg's answer.
type trtAnswer struct {
	Type      string          `json:"request_type"`
	First     []uint32        `json:"first_gen_tokens"`
	Logprobs  null            `json:"first_gen_log_probs"`
	Context   json.Number     `json:"ctx_request_id"`
	State     string          `json:"encoded_opaque_state"`
	Draft     null            `json:"draft_tokens"`
	RequestID json.RawMessage `json:"disagg_request_id"`
	Rank      int             `json:"ctx_dp_rank"`
	Endpoint  string          `json:"ctx_info_endpoint"`
	Style     null            `json:"schedule_style"`
}

// trtState is the opaque state: how the generation server reaches the context server.
type trtState struct {
	Engine string `json:"engine"`
	Pad    string `json:"pad"` // bytes of every value, so that the base64 has all its signs
}

func (w *trtWire) read(c *call, f *fields) (leg, *apiError) {
	ids, bad := c.trtPrompt(f)
	if bad != nil {
		return nil, bad
	}
	v, ok := f.raw("disaggregated_params")
	if !ok {
		return nil, nil //nolint:nilnil // a plain request
	}
	var t trtParams
	if err := errors.Join(json.Unmarshal(v, &t), json.Unmarshal(v, &t.members)); err != nil {
		return nil, invalid("body.disaggregated_params", "value_error", "Input should be valid disaggregated parameters", string(v[:min(len(v), 40)]))
	}
	switch t.Type {
	case trtBoth:
		return nil, nil //nolint:nilnil // a plain request
	case trtContext, trtGeneration:
	default:
		return nil, badRequest("", "Unknown request type: %s", t.Type)
	}
	if len(c.prompts) > 1 || c.n > 1 {
		return nil, badRequest("", "Disaggregated requests have one prompt and one answer.")
	}
	if id, given, err := wholeNumber(t.RequestID); err != nil || given && id < firstGlobalID {
		return nil, badRequest("", "disagg_request_id must be an integer of at least %d, got %s.", firstGlobalID, t.RequestID)
	}
	if t.Type == trtContext {
		c.maxTokens, c.minTokens, c.natural = 1, 0, false
		return &trtContextLeg{p: w.p, requestID: t.RequestID, stream: c.stream, whole: c.api == apiCompletions}, nil
	}
	return w.readGeneration(t, ids)
}

// trtPrompt reads a prompt given as token ids, which a chat may have beside its messages; ids is false without one.
func (c *call) trtPrompt(f *fields) (ids bool, bad *apiError) {
	if v, ok := f.raw("prompt_token_ids"); ok && c.api == apiChat {
		c.prompts, c.texts = nil, nil
		c.addTokens(f, "prompt_token_ids", v)
		if f.err != nil {
			return false, f.err
		}
		if n := len(c.prompts[0]); n == 0 || n >= c.modelLimit {
			return false, tooLong(n, c.modelLimit)
		}
		return true, nil
	}
	return c.api == apiCompletions && len(c.texts) == 1 && c.texts[0] == "", nil
}

// readGeneration checks a generation leg. trtllm-serve would tokenize a text itself; its own router always sends the
// context server's ids, and so must any other, or the KV may be of another prompt.
func (w *trtWire) readGeneration(t trtParams, ids bool) (leg, *apiError) {
	id, given, err := wholeNumber(t.Context)
	switch {
	case t.State == nil || *t.State == "":
		return nil, badRequest("", "encoded_opaque_state is required for generation_only requests.")
	case !given || err != nil:
		return nil, badRequest("", "ctx_request_id must be an integer for generation_only requests, got %q.", t.Context)
	case len(t.First) == 0:
		return nil, badRequest("", "first_gen_tokens is required for generation_only requests.")
	case !ids:
		return nil, badRequest("", "generation_only requests need the prompt as token ids.")
	}
	raw, err := base64.StdEncoding.DecodeString(*t.State)
	var s trtState
	if err != nil || json.Unmarshal(raw, &s) != nil {
		return nil, badRequest("", "encoded_opaque_state cannot be decoded.")
	}
	return &trtGenerationLeg{p: w.p, params: t, contextID: strconv.FormatInt(id, 10), engine: s.Engine}, nil
}

// wholeNumber reads an integer as it is written; given is false for a missing one.
func wholeNumber(n json.Number) (v int64, given bool, err error) {
	if n == "" {
		return 0, false, nil
	}
	v, err = n.Int64()
	return v, true, err
}

// trtContextLeg is the context leg: it prefills, makes the first token and keeps the blocks.
type trtContextLeg struct {
	p         *process
	requestID json.Number
	stream    bool
	whole     bool // a completion, whose prompt_token_ids are not there yet
	prompt    []uint32
	kept      *lease // nil where nothing was
}

func (l *trtContextLeg) phase() string { return phasePrefill }

func (l *trtContextLeg) load(context.Context, *group) (string, error) { return "", nil }

// done keeps the blocks until a generation leg reads them or kv_transfer_timeout_ms passes. An answer that ended by
// itself needs no generation leg and keeps nothing.
func (l *trtContextLeg) done(_ context.Context, g *group) (string, json.RawMessage, error) {
	q := g.seqs[0]
	l.prompt = q.tokens[:q.prompt]
	if q.finish != finishLength {
		return "", nil, nil
	}
	bits, err := strconv.ParseUint(l.p.e.hex(8), 16, 64)
	if err != nil {
		return "", nil, err
	}
	id := strconv.FormatUint(bits>>2|1<<61|1, 10) // odd and above 2^53, so that no float64 has it
	state := trtState{Engine: l.p.id, Pad: l.p.e.hex(24) + "\u00ff\u00fe>?>?"}
	a := trtAnswer{
		Type: trtContext, First: q.generated, Context: json.Number(id), State: base64.StdEncoding.EncodeToString(marshal(state)),
		RequestID: json.RawMessage("null"), Rank: l.p.rank, Endpoint: "tcp://" + l.p.addr.String(),
	}
	if l.requestID != "" {
		a.RequestID = json.RawMessage(l.requestID)
	}
	kept := &lease{id: id, request: g.id, raw: marshal(a), why: "kv_transfer_timeout_ms"}
	if l.stream {
		kept.noRaw = "streamed context leg: no parameters in chunks"
	}
	l.kept = kept
	l.p.keep(q, kept, max(l.p.e.timing.lease, 1))
	return "", nil, nil
}

// left does nothing: what was not kept is freed.
func (l *trtContextLeg) left(*group) {}

// shape adds the parameters to the first choice and the prompt's ids to the answer.
func (l *trtContextLeg) shape(body []byte, odd func(json.RawMessage) json.RawMessage) []byte {
	ids := marshal(l.prompt)
	if l.whole {
		body = addMember(body, "prompt_token_ids", ids)
	} else {
		body = bytes.Replace(body, []byte(`"prompt_token_ids":null`), append([]byte(`"prompt_token_ids":`), ids...), 1)
	}
	if l.kept == nil {
		return body
	}
	l.p.mu.Lock()
	params := odd(l.kept.raw)
	l.kept.raw = params
	l.p.mu.Unlock()
	if params == nil {
		return body
	}
	const choice = `"choices":[{` // not inside a text, where its quotes are escaped
	return bytes.Replace(body, []byte(choice), append([]byte(choice+`"disaggregated_params":`), append(slices.Clip(params), ',')...), 1)
}

// trtGenerationLeg is the generation leg: it reads the context server's blocks and goes on after its first tokens.
type trtGenerationLeg struct {
	p         *process
	params    trtParams
	contextID string
	engine    string
}

func (l *trtGenerationLeg) phase() string { return phaseTransfer }

func (l *trtGenerationLeg) load(ctx context.Context, g *group) (string, error) {
	peer := l.p.e.registry.byID(l.engine)
	if peer == nil {
		return "", l.failed("context server gone")
	}
	var sl sleeper
	defer sl.close()
	if !sl.sleep(ctx, l.p.greet(peer)) {
		return "", errClientGone
	}
	blocks, ok := peer.blocksOf(l.contextID)
	if !ok {
		return "", l.failed("unknown ctx_request_id")
	}
	if len(blocks) < l.p.cache.need(g.seqs[0].prompt) {
		return "", l.failed("the context's prompt is shorter")
	}
	g.seqs[0].given = l.params.First
	rec := Pull{RequestID: l.contextID, Verbatim: l.verbatim(peer)}
	ok, died := l.p.receive(g, peer, blocks[:l.p.cache.need(g.seqs[0].prompt)], rec)
	if died == "" && !ok {
		return "", l.failed("")
	}
	peer.free(l.contextID)
	return died, nil
}

// failed is the answer to a transfer that cannot be; why is "" where it was recorded already.
func (l *trtGenerationLeg) failed(why string) error {
	if why != "" {
		l.p.pullFailed(l.contextID, why)
	}
	return &apiError{
		status: http.StatusInternalServerError, kind: "InternalServerError",
		message: "Error in kv cache transfer for generation request, ctx_request_id " + l.contextID,
	}
}

// verbatim reports whether every parameter came back byte for byte, but for the request's type; more may be added.
func (l *trtGenerationLeg) verbatim(peer *process) bool {
	peer.mu.Lock()
	defer peer.mu.Unlock()
	var given map[string]json.RawMessage
	kept := peer.leases[l.contextID]
	if kept == nil || json.Unmarshal(kept.raw, &given) != nil {
		return false
	}
	delete(given, "request_type")
	for name, value := range given {
		if !bytes.Equal(value, l.params.members[name]) {
			return false
		}
	}
	return true
}

func (l *trtGenerationLeg) done(context.Context, *group) (string, json.RawMessage, error) {
	return "", nil, nil
}

// left does nothing: what the context server holds, it holds until its timer ends.
func (l *trtGenerationLeg) left(*group) {}
