// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"
)

// trtOptions make a pair of TensorRT-LLM servers whose blocks wait for 60 ms.
var trtOptions = Options{Engine: engineTRTLLM, NumBlocks: 400, Scale: 0.001}

// trtPatient are the same for tests in which the generation leg must come before the timer.
var trtPatient = Options{Engine: engineTRTLLM, NumBlocks: 400, Scale: fast, Lease: time.Hour}

// globalID is a snowflake id that no float64 has.
const globalID = "7230451862304518623"

// contextParams ask for a context leg.
const contextParams = `,"disaggregated_params":{"request_type":"context_only","disagg_request_id":` + globalID + `,"schedule_style":"context_first"}`

// contextLeg sends a context leg and returns its parameters and prompt, as they came.
func contextLeg(t *testing.T, e *Engine, path, body string) (params, ids string) {
	t.Helper()
	r := post(t, e, path, body)
	var v struct {
		IDs     json.RawMessage `json:"prompt_token_ids"`
		Choices []struct {
			Params json.RawMessage `json:"disaggregated_params"`
			Finish string          `json:"finish_reason"`
		} `json:"choices"`
		Usage struct {
			Prompt int `json:"prompt_tokens"`
		} `json:"usage"`
	}
	if err := json.Unmarshal(r.body, &v); err != nil || r.status != http.StatusOK || len(v.Choices) != 1 {
		t.Fatalf("context leg: %d %s", r.status, r.body)
	}
	if v.Choices[0].Params == nil || v.Choices[0].Finish != finishLength || v.Usage.Prompt == 0 {
		t.Errorf("context leg: %s", r.body)
	}
	return string(v.Choices[0].Params), string(v.IDs)
}

// generation is what the generation leg gets of a context leg's parameters.
func generation(params string) string {
	return `,"disaggregated_params":` + strings.Replace(params, trtContext, trtGeneration, 1)
}

func TestTRTLLM(t *testing.T) {
	chat := func(extra string) string {
		return `{"model":"tiny","messages":[{"role":"user","content":` + longText + `}],"max_tokens":6,"temperature":0` + extra + `}`
	}
	tests := []struct {
		name, path string
		context    string
		decode     func(params, ids string) string
		plain      string
	}{
		{
			"completions", "/v1/completions", complete(longText, 6, contextParams),
			func(params, ids string) string { return complete(ids, 6, params) }, complete(longText, 6, ""),
		},
		{
			"completions, streamed", "/v1/completions", complete(longText, 6, contextParams),
			func(params, ids string) string { return complete(ids, 6, `,"stream":true`+params) }, complete(longText, 6, `,"stream":true`),
		},
		{
			"chat", "/v1/chat/completions", chat(contextParams),
			func(params, ids string) string { return chat(`,"prompt_token_ids":` + ids + params) }, chat(""),
		},
		{
			"chat, streamed", "/v1/chat/completions", chat(contextParams),
			func(params, ids string) string { return chat(`,"stream":true,"prompt_token_ids":` + ids + params) }, chat(`,"stream":true`),
		},
		{
			"one token", "/v1/completions", complete(longText, 1, contextParams),
			func(params, ids string) string { return complete(ids, 1, params) }, complete(longText, 1, ""),
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p, d := newPair(t, trtPatient)
			params, ids := contextLeg(t, p, tt.path, tt.context)
			if h := p.Held(); len(h) != 1 || h[0].State != "lease" || d.Stats().HeldBlocks != 0 {
				t.Fatalf("held: %+v", h)
			}
			got := post(t, d, tt.path, tt.decode(generation(params), ids))
			want := post(t, newEngine(t, trtPatient), tt.path, tt.plain) // conditional disaggregation: without parameters
			if got.status != http.StatusOK || textsOf(got.body) == "" || textsOf(got.body) != textsOf(want.body) {
				t.Errorf("disaggregated %d %s, aggregated %s", got.status, got.body, want.body)
			}
			if n := len(p.Held()) + len(p.Leaked()); n != 0 {
				t.Errorf("%d holds and leaks", n)
			}
			if pulls := d.Pulls(); len(pulls) != 1 || !pulls[0].Verbatim || pulls[0].Wrong {
				t.Errorf("pulls: %+v", pulls)
			}
		})
	}
}

func TestTRTLLMContextAnswer(t *testing.T) {
	p, _ := newPair(t, trtOptions)
	params, ids := contextLeg(t, p, "/v1/completions", complete(prompt(40, 1), 6, contextParams))
	if ids != prompt(40, 1) {
		t.Errorf("prompt_token_ids: %s", ids)
	}
	var v map[string]json.RawMessage
	if err := json.Unmarshal([]byte(params), &v); err != nil {
		t.Fatal(err)
	}
	id, err := strconv.ParseUint(string(v["ctx_request_id"]), 10, 63)
	if err != nil || id < 1<<53 || uint64(float64(id)) == id {
		t.Errorf("ctx_request_id %s: %v", v["ctx_request_id"], err)
	}
	if string(v["disagg_request_id"]) != globalID || string(v["ctx_dp_rank"]) != "0" || len(v["ctx_info_endpoint"]) < 9 {
		t.Errorf("parameters: %s", params)
	}
	if !bytes.ContainsAny(v["encoded_opaque_state"], "+/") {
		t.Errorf("state is too plain: %s", v["encoded_opaque_state"])
	}
}

// TestTRTLLMComplete is a context leg whose answer ended by itself: nothing is kept, nothing is to be generated.
func TestTRTLLMComplete(t *testing.T) {
	p, _ := newPair(t, trtOptions)
	first := text(t, post(t, p, "/v1/completions", complete(prompt(40, 1), 1, "")))
	r := post(t, p, "/v1/completions", complete(prompt(40, 1), 6, contextParams+`,"stop":"`+first+`"`))
	choice := fmt.Sprint(r.json(t)["choices"])
	if !strings.Contains(choice, "finish_reason:stop") || strings.Contains(choice, "disaggregated_params") {
		t.Errorf("answer: %s", r.body)
	}
	if len(p.Held())+len(p.Leaked()) != 0 {
		t.Errorf("held %+v, leaked %+v", p.Held(), p.Leaked())
	}
}

func TestTRTLLMRefusals(t *testing.T) {
	p, d := newPair(t, trtPatient)
	params, ids := contextLeg(t, p, "/v1/completions", complete(prompt(40, 1), 6, contextParams))
	good := generation(params)
	swap := func(name, value string) string {
		var v map[string]json.RawMessage
		if err := json.Unmarshal([]byte(strings.Replace(params, trtContext, trtGeneration, 1)), &v); err != nil {
			t.Fatal(err)
		}
		v[name] = json.RawMessage(value)
		return `,"disaggregated_params":` + string(marshal(v))
	}
	tests := []struct {
		name, body string
		status     int
	}{
		{"no opaque state", complete(ids, 6, swap("encoded_opaque_state", "null")), 400},
		{"opaque state is not base64", complete(ids, 6, swap("encoded_opaque_state", `"%%"`)), 400},
		{"no context id", complete(ids, 6, swap("ctx_request_id", "null")), 400},
		{"context id through a float", complete(ids, 6, swap("ctx_request_id", "2.5e18")), 400},
		{"unknown context id", complete(ids, 6, swap("ctx_request_id", "4611686018427387905")), 500},
		{"low global id", complete(ids, 6, swap("disagg_request_id", "4398046511103")), 400},
		{"no first token", complete(ids, 6, swap("first_gen_tokens", "null")), 400},
		{"unknown type", complete(ids, 6, swap("request_type", `"both"`)), 400},
		{"prompt is a text", complete(longText, 6, good), 400},
		{"chat without token ids", `{"model":"tiny","messages":[{"role":"user","content":"a"}]` + good + `}`, 400},
		{"longer prompt", complete(prompt(300, 1), 6, good), 500},
		{"two prompts", complete(`[[1,2],[3,4]]`, 6, contextParams), 400},
		{"two answers", complete(prompt(9, 1), 6, `,"n":2,"temperature":1`+contextParams), 400},
		{"low global id at the context", complete(prompt(9, 1), 6, strings.Replace(contextParams, globalID, "7", 1)), 400},
		{"parameters are a text", complete(prompt(9, 1), 6, `,"disaggregated_params":"x"`), 400},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := post(t, d, "/v1/completions", tt.body)
			if strings.Contains(tt.body, "messages") {
				r = post(t, d, "/v1/chat/completions", tt.body)
			}
			if r.status != tt.status || !strings.HasPrefix(string(r.body), `{"object":"error","message":`) {
				t.Errorf("%d %s", r.status, r.body)
			}
		})
	}
	if n := len(d.Held()); n != 0 {
		t.Errorf("the generation server holds %+v", d.Held())
	}
	if r := post(t, d, "/v1/completions", complete(ids, 6, good)); r.status != http.StatusOK || len(p.Leaked()) != 0 {
		t.Errorf("the blocks are gone: %d %s", r.status, r.body)
	}
}

// TestTRTLLMNobodyComes keeps the blocks until the timer, whatever the client does.
func TestTRTLLMNobodyComes(t *testing.T) {
	tests := []struct {
		name string
		send func(t *testing.T, p, d *Engine)
	}{
		{"no generation leg", func(t *testing.T, p, _ *Engine) {
			t.Helper()
			contextLeg(t, p, "/v1/completions", complete(prompt(40, 1), 6, contextParams))
		}},
		{"client leaves after the commit", func(t *testing.T, p, _ *Engine) {
			t.Helper()
			if err := p.SetFaults(Faults{Rules: []Fault{{Kind: faultHang, Late: true}}}); err != nil {
				t.Fatal(err)
			}
			l := start(t, p, "/v1/completions", complete(prompt(40, 1), 6, contextParams))
			eventually(t, "committed", func() bool { return p.Stats().Leases == 1 || p.Stats().Leaked == 1 })
			l.cancel()
			<-l.done
		}},
		{"streamed context leg", func(t *testing.T, p, _ *Engine) {
			t.Helper()
			post(t, p, "/v1/completions", complete(prompt(40, 1), 6, `,"stream":true`+contextParams))
		}},
		{"parameters lost", func(t *testing.T, p, _ *Engine) {
			t.Helper()
			if err := p.SetFaults(Faults{Rules: []Fault{{Kind: faultNoHandle}}}); err != nil {
				t.Fatal(err)
			}
			if r := post(t, p, "/v1/completions", complete(prompt(40, 1), 6, contextParams)); strings.Contains(string(r.body), "ctx_request_id") {
				t.Errorf("answer: %s", r.body)
			}
		}},
		{"generation leg after the timer", func(t *testing.T, p, d *Engine) {
			t.Helper()
			params, ids := contextLeg(t, p, "/v1/completions", complete(prompt(40, 1), 6, contextParams))
			settle(t, p)
			if r := post(t, d, "/v1/completions", complete(ids, 6, generation(params))); r.status != http.StatusInternalServerError {
				t.Errorf("generation: %d %s", r.status, r.body)
			}
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p, d := newPair(t, trtOptions)
			tt.send(t, p, d)
			settle(t, p)
			if l := p.Leaked(); len(l) != 1 || l[0].Blocks != 3 || !strings.HasPrefix(l[0].Reason, "kv_transfer_timeout_ms") {
				t.Errorf("leaks: %+v", l)
			}
		})
	}
}

func TestTRTLLMRestartBetweenLegs(t *testing.T) {
	p, d := newPair(t, trtOptions)
	params, ids := contextLeg(t, p, "/v1/completions", complete(prompt(40, 1), 6, contextParams))
	if err := p.Restart(); err != nil {
		t.Fatal(err)
	}
	r := post(t, d, "/v1/completions", complete(ids, 6, generation(params)))
	if r.status != http.StatusInternalServerError || d.Stats().FailedPulls != 1 {
		t.Errorf("generation: %d %s", r.status, r.body)
	}
	settle(t, p)
	settle(t, d)
}

// TestTRTLLMAnotherPrompt is a generation leg whose ids are not the context's: its text is another's.
func TestTRTLLMAnotherPrompt(t *testing.T) {
	p, d := newPair(t, trtPatient)
	params, _ := contextLeg(t, p, "/v1/completions", complete(prompt(40, 1), 6, contextParams))
	got := text(t, post(t, d, "/v1/completions", complete(prompt(40, 2), 6, generation(params))))
	if got[pieceBytes:] != strings.ToUpper(got[pieceBytes:]) || d.Stats().WrongPulls != 1 {
		t.Errorf("text %q, %+v", got, d.Pulls())
	}
}

func TestTRTLLMOddParameters(t *testing.T) {
	p, d := newPair(t, trtPatient)
	if err := p.SetFaults(Faults{Rules: []Fault{{Kind: faultOddHandle}}}); err != nil {
		t.Fatal(err)
	}
	params, ids := contextLeg(t, p, "/v1/completions", complete(prompt(40, 1), 6, contextParams))
	if !strings.Contains(params, "zz_big") {
		t.Fatalf("parameters: %s", params)
	}
	damaged := strings.Replace(generation(params), "1.50", "1.5", 1)
	for i, body := range []string{damaged, generation(params)} {
		if i > 0 {
			params, ids = contextLeg(t, p, "/v1/completions", complete(prompt(40, 1), 6, contextParams))
			body = generation(params)
		}
		if r := post(t, d, "/v1/completions", complete(ids, 6, body)); r.status != http.StatusOK {
			t.Fatalf("%d %s", r.status, r.body)
		}
	}
	if l := d.Pulls(); len(l) != 2 || l[0].Verbatim || !l[1].Verbatim {
		t.Errorf("pulls: %+v", l)
	}
}

// TestTRTLLMAbortBeforeCommit frees at once.
func TestTRTLLMAbortBeforeCommit(t *testing.T) {
	o := trtOptions
	o.PrefillFixed = 1000 * time.Hour
	p, _ := newPair(t, o)
	l := start(t, p, "/v1/completions", complete(prompt(40, 1), 6, contextParams))
	eventually(t, "prefill", func() bool { return len(p.Held()) == 1 })
	l.cancel()
	<-l.done
	settle(t, p)
	abortOf(t, p)
	if len(p.Leaked()) != 0 {
		t.Errorf("leaks %+v", p.Leaked())
	}
}
