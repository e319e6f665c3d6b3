// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"
)

func newSGLangEngine(t *testing.T, o Options) *Engine {
	t.Helper()
	o.Engine = engineSGLang
	return newEngine(t, o)
}

// eventsOf are the payloads of a stream, without the last.
func eventsOf(t *testing.T, body []byte) []string {
	t.Helper()
	s, ok := strings.CutSuffix(string(body), "data: [DONE]\n\n")
	if !ok {
		t.Fatalf("no end: %q", body)
	}
	var out []string
	for e := range strings.SplitSeq(strings.TrimSuffix(s, "\n\n"), "\n\n") {
		out = append(out, strings.TrimPrefix(e, "data: "))
	}
	return out
}

func TestNativeGenerate(t *testing.T) {
	e := newSGLangEngine(t, Options{})
	one := post(t, e, "/generate", native(longText, 3, `,"rid":"mine"`)).json(t)
	meta, _ := one["meta_info"].(map[string]any)
	if text, _ := one["text"].(string); len(text) != 3*pieceBytes || meta["id"] != "mine" || meta["completion_tokens"] != 3.0 || meta["prompt_tokens"] != 20.0 {
		t.Errorf("answer: %v", one)
	}
	if fmt.Sprint(meta["finish_reason"]) != "map[length:3 type:length]" || meta["cached_tokens"] != 0.0 {
		t.Errorf("meta: %v", meta)
	}
	again := post(t, e, "/generate", native(longText, 3, "")).json(t)
	if m, _ := again["meta_info"].(map[string]any); again["text"] != one["text"] || m["cached_tokens"] != 16.0 {
		t.Errorf("again: %v", again)
	}
	stop, _ := one["text"].(string)
	r := post(t, e, "/generate", `{"text":`+longText+`,"sampling_params":{"temperature":0,"stop":"`+stop[4:8]+`"}}`)
	if !strings.Contains(string(r.body), `"finish_reason":{"type":"stop","matched":"`+stop[4:8]+`"}`) {
		t.Errorf("stop: %s", r.body)
	}
	r = post(t, e, "/generate", `{"input_ids":[5,6,7],"return_logprob":true,"logprob_start_len":0,"sampling_params":{"max_new_tokens":2}}`)
	if !strings.Contains(string(r.body), `"input_token_logprobs":[[null,5,null],[-`) || !strings.Contains(string(r.body), `"output_token_logprobs":[[-`) {
		t.Errorf("logprobs: %s", r.body)
	}
}

func TestNativeStream(t *testing.T) {
	e := newSGLangEngine(t, Options{})
	whole := post(t, e, "/generate", native(longText, 3, "")).json(t)
	list := eventsOf(t, post(t, e, "/generate", native(longText, 3, `,"stream":true`)).body)
	if len(list) != 3 || !strings.Contains(list[0], `"finish_reason":null`) || !strings.Contains(list[2], `"type":"length"`) {
		t.Fatalf("events: %v", list)
	}
	for i, ev := range list {
		text := reply{body: []byte(ev)}.json(t)["text"]
		if all, _ := whole["text"].(string); text != all[:(i+1)*pieceBytes] {
			t.Errorf("event %d: %q of %q", i, text, all)
		}
	}
	list = eventsOf(t, post(t, e, "/generate", native(`["one text","two text"]`, 2, `,"stream":true`)).body)
	if len(list) != 4 || !strings.HasSuffix(list[0], `,"index":0}`) || !strings.HasSuffix(list[3], `"index":1}`) {
		t.Errorf("batch: %v", list)
	}
}

func TestNativeBatch(t *testing.T) {
	e := newSGLangEngine(t, Options{})
	tests := []struct {
		name, body string
		want       []string
	}{
		{
			"one rid for all", native(`["one text","two text"]`, 2, `,"rid":"r"`),
			[]string{`[{"text":" `, `"id":"r_0"`, `"id":"r_1"`},
		},
		{"list of one", native(`["one text"]`, 2, ``), []string{`[{"text":" `}},
		{
			"limits of each", `{"input_ids":[[1,2],[3,4,5]],"sampling_params":[{"max_new_tokens":1},{"max_new_tokens":4}]}`,
			[]string{`{"type":"length","length":1}`, `{"type":"length","length":4}`, `"prompt_tokens":3`, `"completion_tokens":4`},
		},
		{"two answers", `{"text":"a text","sampling_params":{"max_new_tokens":1,"n":2}}`, []string{`[{"text":" `, `},{"text":" `}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := post(t, e, "/generate", tt.body)
			for _, want := range tt.want {
				if r.status != http.StatusOK || !strings.Contains(string(r.body), want) {
					t.Errorf("no %s in %d %s", want, r.status, r.body)
				}
			}
		})
	}
}

func TestNativeErrors(t *testing.T) {
	e := newSGLangEngine(t, Options{MaxModelLen: 40})
	tests := []struct{ name, body, want string }{
		{"no prompt", `{"sampling_params":{}}`, "Either text, input_ids"},
		{"two prompts", `{"text":"a","input_ids":[1]}`, "Either text, input_ids"},
		{"empty prompt", `{"input_ids":[]}`, "empty"},
		{"empty batch", `{"text":[]}`, "empty"},
		{"text is a number", `{"text":7}`, "valid string"},
		{"ids are texts", `{"input_ids":["a"]}`, "valid list"},
		{"ids are a number", `{"input_ids":7}`, "valid list"},
		{"sampling of another length", `{"text":["a","b"],"sampling_params":[{}]}`, "batch size"},
		{"sampling is a text", `{"text":"a","sampling_params":"x"}`, "dictionary"},
		{"limit below 0", native(`"a"`, -1, ""), "max_new_tokens must be at least 0"},
		{"least above most", `{"text":"a","sampling_params":{"max_new_tokens":2,"min_new_tokens":3}}`, "min_new_tokens must be in"},
		{"n of 0", `{"text":"a","sampling_params":{"n":0}}`, "n must be at least 1"},
		{"two n", `{"text":["a","b"],"sampling_params":[{"n":1},{"n":2}]}`, "should be the same"},
		{"negative temperature", `{"text":"a","sampling_params":{"temperature":-1}}`, "non-negative"},
		{"rids of another length", native(`["a","b","c"]`, 1, `,"rid":["x","y"]`), "rids length mismatch"},
		{"too long", `{"input_ids":` + prompt(50, 1) + `}`, "longer than the model's context length"},
		{"not JSON", `{`, "JSON decode error"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := post(t, e, "/generate", tt.body)
			if r.status != http.StatusBadRequest || !strings.HasPrefix(string(r.body), `{"error":{"message":`) || !strings.Contains(string(r.body), tt.want) {
				t.Errorf("%d %s", r.status, r.body)
			}
		})
	}
	r := post(t, e, "/v1/completions", `{"model":"none","prompt":"a"}`)
	if r.status != http.StatusNotFound || !strings.HasPrefix(string(r.body), `{"object":"error","message":"The model`) {
		t.Errorf("OpenAI error: %d %s", r.status, r.body)
	}
}

func TestSGLangRoutes(t *testing.T) {
	e := newSGLangEngine(t, Options{})
	other := newEngine(t, Options{})
	for _, path := range []string{"/health_generate", "/get_model_info"} {
		if r := get(t, e, path); r.status != http.StatusOK {
			t.Errorf("%s: %d", path, r.status)
		}
		if r := get(t, other, path); r.status != http.StatusNotFound {
			t.Errorf("%s of vLLM: %d", path, r.status)
		}
	}
	if r := post(t, other, "/generate", native(`"a"`, 1, "")); r.status != http.StatusNotFound {
		t.Errorf("/generate of vLLM: %d", r.status)
	}
}

// TestAbortByPrefix ends what has the prefix, in every state, and nothing beside it.
func TestAbortByPrefix(t *testing.T) {
	slow := Options{Scale: 0.01, InterToken: time.Hour, MaxNumSeqs: 2}
	t.Run("decoding, queued and siblings", func(t *testing.T) {
		e := newSGLangEngine(t, slow)
		mine := start(t, e, "/generate", native(longText, 200, `,"rid":"req-1-aa"`))
		sibling := start(t, e, "/v1/completions", complete(prompt(30, 2), 200, `,"rid":"req-1-bb","stream":true`))
		eventually(t, "two run", func() bool { return e.Stats().Running == 2 })
		queued := start(t, e, "/v1/completions", complete(prompt(30, 3), 200, `,"rid":"req-1-aa-2"`))
		eventually(t, "one waits", func() bool { return e.Stats().Waiting == 1 })
		if r := post(t, e, "/abort_request", `{"rid":"req-1-aa"}`); r.status != http.StatusOK {
			t.Fatalf("abort: %d", r.status)
		}
		if r := mine.wait(t); r.status != http.StatusOK || !strings.Contains(string(r.body), `"finish_reason":{"type":"abort"`) {
			t.Errorf("decoding: %d %s", r.status, r.body)
		}
		if r := queued.wait(t); r.status != http.StatusOK || !strings.Contains(string(r.body), `"finish_reason":"abort"`) {
			t.Errorf("queued: %d %s", r.status, r.body)
		}
		if n := e.Stats().Running; n != 1 || len(e.Aborts()) != 2 {
			t.Errorf("%d run, aborts %+v", n, e.Aborts())
		}
		post(t, e, "/abort_request", `{"rid":"req-2"}`) // nobody's
		post(t, e, "/abort_request", `{"abort_all":true}`)
		list := eventsOf(t, sibling.wait(t).body)
		if last := list[len(list)-1]; !strings.Contains(last, `"finish_reason":"abort"`) {
			t.Errorf("sibling's last event: %s", last)
		}
	})
	t.Run("waiting for its prefill leg", func(t *testing.T) {
		p, d := newPair(t, patient)
		decode := start(t, d, "/generate", native(longText, 4, `,"stream":true,"rid":"r-x1"`+roomOf(p, 9)))
		eventually(t, "the decode leg waits", func() bool { return sglangOf(p.running()).rooms.count() == 1 })
		post(t, d, "/abort_request", `{"rid":"r-x1"}`)
		if r := decode.wait(t); !strings.Contains(string(r.body), `"type":"abort"`) {
			t.Errorf("decode: %d %s", r.status, r.body)
		}
		settle(t, d)
		if n := sglangOf(p.running()).rooms.count(); n != 0 || len(d.Aborts()) != 1 {
			t.Errorf("%d rooms, aborts %+v", n, d.Aborts())
		}
	})
	t.Run("not a text", func(t *testing.T) {
		e := newSGLangEngine(t, slow)
		if r := post(t, e, "/abort_request", `{"rid":7}`); r.status != http.StatusBadRequest {
			t.Errorf("%d", r.status)
		}
	})
}
