// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

func TestAnswerIsDeterministic(t *testing.T) {
	a, b := newEngine(t, Options{}), newEngine(t, Options{Seed: 7, BlockSize: 32})
	body := complete(`"once upon a time"`, 16, "")
	first := text(t, post(t, a, "/v1/completions", body))
	if again := text(t, post(t, b, "/v1/completions", body)); again != first {
		t.Errorf("%q and %q", first, again)
	}
	if other := text(t, post(t, a, "/v1/completions", complete(`"once upon a tome"`, 16, ""))); other == first {
		t.Error("another prompt, the same text")
	}
	warm := func(seed int) string {
		return text(t, post(t, a, "/v1/completions", fmt.Sprintf(`{"prompt":"x","max_tokens":8,"temperature":1,"seed":%d}`, seed)))
	}
	if one := warm(1); warm(1) != one || warm(2) == one {
		t.Error("the seed does not decide")
	}
}

func TestStreamEqualsWhole(t *testing.T) {
	e := newEngine(t, Options{})
	whole := text(t, post(t, e, "/v1/completions", complete(`"some prompt"`, 9, "")))
	var got strings.Builder
	for ev := range strings.SplitSeq(string(post(t, e, "/v1/completions", complete(`"some prompt"`, 9, `,"stream":true`)).body), "\n\n") {
		if _, rest, ok := strings.Cut(ev, `"text":"`); ok {
			s, _, _ := strings.Cut(rest, `"`)
			got.WriteString(s)
		}
	}
	if got.String() != whole {
		t.Errorf("stream %q, whole %q", got.String(), whole)
	}
}

func TestStopStringsAndNaturalEnd(t *testing.T) {
	e := newEngine(t, Options{})
	whole := text(t, post(t, e, "/v1/completions", complete(`"x"`, 20, "")))
	r := post(t, e, "/v1/completions", complete(`"x"`, 20, `,"stop":"`+whole[6:11]+`"`)).json(t)["choices"].([]any)[0].(map[string]any)
	if r["text"] != whole[:6] || r["finish_reason"] != "stop" || r["stop_reason"] != whole[6:11] {
		t.Errorf("stop: %v of %q", r, whole)
	}
	c := post(t, e, "/v1/chat/completions", `{"messages":[{"role":"user","content":"hi"}]}`).json(t)["choices"].([]any)[0].(map[string]any)
	if c["finish_reason"] != "stop" || len(c["message"].(map[string]any)["content"].(string)) < 16*pieceBytes {
		t.Errorf("natural end: %v", c)
	}
}

func TestPrefixCacheAcrossTurns(t *testing.T) {
	e := newEngine(t, Options{})
	question := strings.Repeat("word", 100)
	chat := func(messages string) map[string]any {
		return post(t, e, "/v1/chat/completions", `{"temperature":0,"max_tokens":64,"messages":[`+messages+`]}`).json(t)
	}
	first := chat(`{"role":"user","content":"` + question + `"}`)
	answer := first["choices"].([]any)[0].(map[string]any)["message"].(map[string]any)["content"].(string)
	second := chat(`{"role":"user","content":"` + question + `"},{"role":"assistant","content":"` + answer + `"},{"role":"user","content":"and?"}`)
	cached := second["usage"].(map[string]any)["prompt_tokens_details"].(map[string]any)["cached_tokens"].(float64)
	if cached != 160 { // 105 prompt tokens and 63 generated ones are 10 full blocks
		t.Errorf("cached tokens in the second turn: %v", cached)
	}
	if s := e.Stats(); s.PrefixHits != 160 {
		t.Errorf("stats: %+v", s)
	}
	if r := post(t, e, "/reset_prefix_cache", ""); r.status != http.StatusOK {
		t.Errorf("reset: %d", r.status)
	}
	if third := chat(`{"role":"user","content":"` + question + `"}`); third["usage"].(map[string]any)["prompt_tokens_details"].(map[string]any)["cached_tokens"].(float64) != 0 {
		t.Error("cache not reset")
	}
}

func TestQueueAndCapacity(t *testing.T) {
	e := newEngine(t, Options{MaxNumSeqs: 2, MaxWaiting: 3, InterToken: time.Hour})
	var stops []func()
	for i := range 2 {
		_, stop := begin(t, e, complete(prompt(20, i), 100, ""))
		stops = append(stops, stop)
	}
	eventually(t, "2 running", func() bool { return e.Stats().Running == 2 })
	var queued []<-chan reply
	for i := range 3 {
		answer, _ := begin(t, e, complete(prompt(20, 2+i), 1, ""))
		queued = append(queued, answer)
	}
	eventually(t, "2 running, 3 waiting", func() bool { s := e.Stats(); return s.Running == 2 && s.Waiting == 3 })
	if a, b := metric(t, e, "vllm:num_requests_running"), metric(t, e, "vllm:num_requests_waiting"); a != "2.0" || b != "3.0" {
		t.Errorf("running %s, waiting %s", a, b)
	}
	for _, stream := range []string{"", `,"stream":true`} {
		r := post(t, e, "/v1/completions", complete(prompt(20, 9), 1, stream))
		if r.status != http.StatusServiceUnavailable {
			t.Errorf("over the limit: %d", r.status)
		}
	}
	for _, stop := range stops {
		stop()
	}
	for _, answer := range queued {
		if r := <-answer; r.err != nil || r.status != http.StatusOK {
			t.Errorf("queued: status %d, %v", r.status, r.err)
		}
	}
}

func TestPreemptionStillAnswersRight(t *testing.T) {
	big := newEngine(t, Options{})
	small := newEngine(t, Options{NumBlocks: 17, MaxModelLen: 200, InterToken: 100 * time.Millisecond})
	preempted := func() bool { return metric(t, small, "vllm:num_preemptions_total") != "0.0" }
	for round := 0; round < 20 && !preempted(); round++ { // on a busy machine requests may not meet
		var wg sync.WaitGroup
		for i := range 4 {
			wg.Go(func() {
				body := complete(prompt(40, i), 100, "")
				want := text(t, post(t, big, "/v1/completions", body))
				if got := text(t, post(t, small, "/v1/completions", body)); got != want {
					t.Errorf("request %d: %q, want %q", i, got, want)
				}
			})
		}
		wg.Wait()
	}
	if !preempted() {
		t.Error("nothing was preempted")
	}
}

func TestSeveralAnswersShareThePrompt(t *testing.T) {
	body := `{"prompt":` + prompt(168, 1) + `,"max_tokens":4,"n":3,"seed":1}`
	slow := newEngine(t, Options{InterToken: time.Hour})
	_, stop := begin(t, slow, body)
	eventually(t, "running", func() bool { return slow.Stats().Running == 3 })
	if s := slow.Stats(); s.HeldBlocks != 13 { // 10 full ones shared, one of its own for each
		t.Errorf("held blocks: %d", s.HeldBlocks)
	}
	stop()
	r := post(t, newEngine(t, Options{}), "/v1/completions", body)
	choices := r.json(t)["choices"].([]any)
	if len(choices) != 3 || choices[0].(map[string]any)["text"] == choices[1].(map[string]any)["text"] {
		t.Errorf("choices: %v", choices)
	}
}

// TestAbort covers every state that a client can leave in (F9, F25, F31).
func TestAbort(t *testing.T) {
	long := time.Hour
	tests := []struct {
		state string
		o     Options
		body  func(handle string) string
	}{
		{stateQueued, Options{MaxNumSeqs: 1, InterToken: long}, func(h string) string { return complete(prompt(50, 3), 5, withHandle(h)) }},
		{statePrefill, Options{PrefillFixed: long}, func(string) string { return complete(prompt(50, 3), 5, askHandle) }},
		{statePull, Options{TransferFixed: 200 * time.Second}, func(h string) string { return complete(prompt(50, 3), 5, withHandle(h)) }},
		{stateDecode, Options{InterToken: long}, func(string) string { return complete(prompt(50, 3), 5, `,"stream":true`) }},
	}
	for _, tt := range tests {
		t.Run(tt.state, func(t *testing.T) {
			t.Parallel()
			peers := NewRegistry()
			p := newEngine(t, Options{Name: "p", Peers: peers, Lease: long})
			tt.o.Name, tt.o.Peers, tt.o.LoadStretch = "d", peers, -1
			d := newEngine(t, tt.o)
			h := prefillLeg(t, p, prompt(50, 3), "")
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			var wg sync.WaitGroup
			if tt.state == stateQueued {
				wg.Go(func() {
					_, _ = send(ctx, t, http.MethodPost, d.URL()+"/v1/completions", complete(prompt(20, 1), 5, `,"priority":1`))
				})
				eventually(t, "blocker", func() bool { return d.Stats().Running == 1 })
			}
			own, leave := context.WithCancel(ctx)
			wg.Go(func() {
				_, err := send(own, t, http.MethodPost, d.URL()+"/v1/completions", tt.body(h), "X-Request-Id", "leaver")
				if err == nil && tt.state != stateDecode {
					t.Error("answered")
				}
			})
			eventually(t, tt.state, func() bool { return inState(d, "cmpl-leaver") == tt.state })
			leave()
			if a := abortOf(t, d); a.State != tt.state || a.RequestID != "cmpl-leaver" {
				t.Errorf("abort: %+v", a)
			}
			if tt.state == stateQueued || tt.state == statePull {
				eventually(t, "prefill engine freed", func() bool { return len(p.Held()) == 0 })
			} else {
				p.notify(t)
			}
			cancel()
			wg.Wait()
			if v := metric(t, d, `vllm:request_success_total{engine="0",finished_reason="abort",model_name="tiny"}`); v != "0.0" {
				t.Errorf("aborts counted: %s", v)
			}
			if len(p.Leaked())+len(d.Leaked()) != 0 {
				t.Error("leaks")
			}
		})
	}
}

// abortOf is the one abort of e. It is recorded after the request's blocks were freed.
func abortOf(t *testing.T, e *Engine) Abort {
	t.Helper()
	eventually(t, "abort", func() bool { return len(e.Aborts()) == 1 })
	return e.Aborts()[0]
}

// inState is the state of a request in e.
func inState(e *Engine, id string) string {
	p := e.running()
	p.mu.Lock()
	defer p.mu.Unlock()
	for g := range p.active {
		if g.id == id {
			return g.state
		}
	}
	return ""
}

// notify frees every lease of e, as if its decode engine had read them.
func (e *Engine) notify(t *testing.T) {
	t.Helper()
	for _, h := range e.Held() {
		e.running().notify(h.RemoteRequestID)
	}
}

func TestAbortAfterTheEndIsIgnored(t *testing.T) {
	p := newEngine(t, pairOptions)
	if _, err := send(t.Context(), t, http.MethodPost, p.URL()+"/v1/completions", complete(prompt(100, 1), 1, askHandle)); err != nil {
		t.Fatal(err)
	}
	if len(p.Held()) != 1 || len(p.Aborts()) != 0 {
		t.Errorf("held %+v, aborts %+v", p.Held(), p.Aborts())
	}
}

func TestKillAndRestart(t *testing.T) {
	e := newEngine(t, Options{InterToken: time.Hour})
	errs := make(chan error, 1)
	go func() {
		r, err := send(t.Context(), t, http.MethodPost, e.URL()+"/v1/completions", complete(prompt(50, 1), 5, `,"stream":true`))
		errs <- errors.Join(err, r.err)
	}()
	eventually(t, "running", func() bool { return e.Stats().Running == 1 })
	id, addr := e.ID(), e.Addr()
	e.Kill()
	if err := <-errs; err == nil {
		t.Error("the stream ended well")
	}
	if err := e.Restart(); err != nil {
		t.Fatal(err)
	}
	if e.ID() == id || e.Addr() != addr {
		t.Errorf("id %s then %s, address %s then %s", id, e.ID(), addr, e.Addr())
	}
	if s := e.Stats(); s.HeldBlocks != 0 || s.PromptTokens != 0 || !s.Alive {
		t.Errorf("stats: %+v", s)
	}
	if err := e.Start(); !errors.Is(err, ErrRunning) {
		t.Errorf("second start: %v", err)
	}
}

func TestIdleConnectionsAreClosed(t *testing.T) {
	e := newEngine(t, Options{KeepAlive: 30 * time.Millisecond, Scale: 1})
	c := newClient(t)
	for range 2 {
		resp, err := c.Get(e.URL() + "/health")
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		eventually(t, "closed", func() bool {
			p := e.running()
			p.connMu.Lock()
			defer p.connMu.Unlock()
			return len(p.open) == 0
		})
	}
}

func TestBodiesAreRecorded(t *testing.T) {
	e := newEngine(t, Options{RecordBodies: 2})
	body := `{ "prompt" : "x","max_tokens":1, "zz":123456789012345678901234567890,"é":"\u00e9"}`
	for range 3 {
		post(t, e, "/v1/completions?a=b", body, "X-Request-Id", "r1", "X-Processor-Attempt", "2", "Authorization", "Bearer s")
	}
	got := e.Bodies()
	if len(got) != 2 || string(got[0].Body) != body || got[0].RequestID != "r1" || got[0].Attempt != "2" ||
		got[0].URI != "/v1/completions?a=b" || got[0].Header.Get("Authorization") != "Bearer s" || got[0].Phase != phasePlain {
		t.Errorf("recorded: %+v", got)
	}
	e.ResetRecords()
	if len(e.Bodies()) != 0 || e.Stats().Requests != 0 {
		t.Error("not forgotten")
	}
}

func TestOddBodies(t *testing.T) {
	e := newEngine(t, Options{})
	utf16 := func(s string) string {
		out := []byte{0xff, 0xfe}
		for _, c := range []byte(s) {
			out = append(out, c, 0)
		}
		return string(out)
	}
	tests := []struct {
		name, path, body string
		status           int
	}{
		{"NaN", "/v1/completions", `{"prompt":"NaN \" NaN","max_tokens":1,"top_p":NaN}`, 200},
		{"UTF-16", "/v1/completions", utf16(`{"prompt":"x","max_tokens":1}`), 200},
		{"other case is another field", "/v1/completions", `{"prompt":"x","max_tokens":1,"STREAM":true,"Max_Tokens":0}`, 200},
		{"last duplicate wins", "/v1/completions", `{"prompt":"x","max_tokens":0,"max_tokens":1}`, 200},
		{"array", "/v1/completions", `[1]`, 400},
		{"empty", "/v1/completions", ``, 400},
		{"number as text", "/v1/completions", `{"prompt":"x","max_tokens":"3","n":1.0}`, 200},
		{"text as number", "/v1/completions", `{"prompt":"x","max_tokens":"three"}`, 400},
		{"prompt object", "/v1/completions", `{"prompt":{}}`, 400},
		{"prompts of both kinds", "/v1/completions", `{"prompt":["a",[1,2]],"max_tokens":1}`, 200},
		{"escaped key", "/v1/completions", `{"prompt":"x","max_tokens":1,"kv_transfer_p\u0061rams":5}`, 400},
		{"slash", "/v1/completions/", `{"prompt":"x"}`, 307},
		{"two slashes", "//v1/completions", `{"prompt":"x"}`, 404},
		{"query", "/v1/completions?x=1", `{"prompt":"x"}`, 200},
		{"image", "/v1/chat/completions", `{"messages":[{"role":"user","content":[{"type":"text","text":"hi"},{"type":"image_url","image_url":{"url":"u"}}]}],"max_tokens":1}`, 200},
		{"input items", "/v1/responses", `{"input":[{"role":"user","content":[{"type":"input_text","text":"hi"}]}],"max_output_tokens":1}`, 200},
		{"too long", "/v1/completions", complete(prompt(66000, 1), 1, ""), 400},
		{"scale-out", "/inference/v1/generate", `{"token_ids":[1]}`, 403},
		{"render", "/v1/completions/render", `{}`, 403},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			if r := post(t, e, tt.path, tt.body); r.status != tt.status {
				t.Errorf("status %d, want %d: %s", r.status, tt.status, r.body)
			}
		})
	}
}

func TestGenerateExtraArgsCarryTransferParams(t *testing.T) {
	e := newEngine(t, Options{ScaleOut: true})
	post(t, e, "/inference/v1/generate", `{"token_ids":[1,2,3],"sampling_params":{"max_tokens":1,"extra_args":{"kv_transfer_params":{"do_remote_prefill":true}}}}`)
	checkDeath(t, e, true)
}

func TestLoRA(t *testing.T) {
	e := newEngine(t, Options{LoRAs: []string{"sql", "chat"}, InterToken: time.Hour})
	body := func(model string, tokens int) string {
		return fmt.Sprintf(`{"model":%q,"prompt":"x","max_tokens":%d}`, model, tokens)
	}
	for _, model := range []string{"sql", "chat"} {
		if r := post(t, e, "/v1/completions", body(model, 1)); r.status != http.StatusOK || !strings.Contains(string(r.body), `"model":"`+model+`"`) {
			t.Errorf("%s", r.body)
		}
	}
	series := func(running, waiting string) bool {
		return strings.Contains(string(get(t, e, "/metrics").body),
			fmt.Sprintf(`vllm:lora_requests_info{max_lora="1",running_lora_adapters=%q,waiting_lora_adapters=%q} 1.`, running, waiting))
	}
	_, end := begin(t, e, body("sql", 20))
	eventually(t, "sql runs", func() bool { return e.Stats().Running == 1 })
	_, endNext := begin(t, e, body("chat", 20))
	eventually(t, "chat deferred", func() bool { return e.Stats().Deferred == 1 })
	eventually(t, "sql and chat in the series", func() bool { return series("sql", "chat") })
	end()
	eventually(t, "chat runs", func() bool { return series("chat", "") })
	endNext()
	eventually(t, "all-empty series", func() bool { return series("", "") })
}

func TestPool(t *testing.T) {
	p, err := NewPool(PoolOptions{Prefill: 2, Decode: 3, Both: 1, Template: Options{Scale: fast}})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.Close() })
	path := filepath.Join(t.TempDir(), "endpoints.yaml")
	if err := p.WriteEndpoints(path); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range p.Engines() {
		want := fmt.Sprintf("- name: %s\n  namespace: default\n  address: \"127.0.0.1\"\n  port: \"%d\"\n  labels:\n    llm-d.ai/role: %s\n    baton-epp/sidecar: \"false\"\n",
			e.Name(), e.Addr().Port(), e.Role())
		if !strings.Contains(string(b), want) {
			t.Errorf("file\n%swants\n%s", b, want)
		}
	}
	h := prefillLeg(t, p.Engine("prefill-1"), prompt(100, 1), "")
	if r := post(t, p.Engine("decode-2"), "/v1/completions", complete(prompt(100, 1), 3, withHandle(h))); r.status != http.StatusOK {
		t.Errorf("decode: %d", r.status)
	}
}

func TestRunPool(t *testing.T) {
	path := filepath.Join(t.TempDir(), "endpoints.yaml")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- RunPool(ctx, PoolOptions{Plain: 2, EndpointsFile: path}, nil) }()
	eventually(t, "file", func() bool { _, err := os.Stat(path); return err == nil })
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(path); err == nil {
		t.Error("file left")
	}
}

func TestBadOptions(t *testing.T) {
	f := func(o Options, want string) {
		t.Helper()
		if _, err := New(o); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: error %v, want one that says %q", o, err, want)
		}
	}
	f(Options{Addr: "localhost"}, `"localhost", must be ip:port`)
	f(Options{BlockSize: -1}, "--block-size: -1, must be from 1")
	f(Options{NumBlocks: 1}, "--num-blocks: 1, must be from 2")
	f(Options{MaxNumSeqs: -1}, "--max-num-seqs: -1, must be from 1")
	f(Options{MaxWaiting: -1}, "--max-waiting: -1, must be from 0")
	f(Options{MaxModelLen: -1}, "--max-model-len: -1, must be from 0")
	f(Options{MaxLoRAs: -1}, "MaxLoRAs: -1")
	f(Options{TPSize: -1}, "TPSize: -1")
	f(Options{MetricsPage: MetricsPage{Padding: -1}}, "MetricsPage.Padding: -1")
	f(Options{Scale: -1}, "--scale: -1, must be above 0")
	f(Options{LoadFailurePolicy: "x"}, `--kv-load-failure-policy: "x", must be fail or recompute`)
	f(Options{Generation: "x"}, `--generation: "x", must be empty or old`)
	f(Options{Faults: Faults{Rules: []Fault{{Kind: "x"}}}}, "x")
	f(Options{Faults: Faults{Metrics: "x"}}, "x")
}

func TestBadPools(t *testing.T) {
	f := func(o PoolOptions, want string) {
		t.Helper()
		if _, err := NewPool(o); err == nil || err.Error() != "simulated "+want {
			t.Errorf("%+v: error %v, want %q", o, err, want)
		}
	}
	f(PoolOptions{}, "pool: no engines: set --prefill, --decode, --both or --plain")
	f(PoolOptions{Prefill: -1, Decode: 2}, "pool: --prefill: -1 engines, must be from 0 to 65535")
	f(PoolOptions{Prefill: -1, Decode: 1}, "pool: --prefill: -1 engines, must be from 0 to 65535")
	f(PoolOptions{Plain: 100_000}, "pool: --plain: 100000 engines, must be from 0 to 65535")
	f(PoolOptions{Plain: 1, BasePort: -1}, "pool: --base-port: -1, must be 0 or leave 1 ports up to 65535")
	f(PoolOptions{Plain: 3, BasePort: 65534}, "pool: --base-port: 65534, must be 0 or leave 3 ports up to 65535")
	f(PoolOptions{Plain: 1, Host: "localhost"}, `pool: --host: "localhost", must be an IP address`)
	f(PoolOptions{Plain: 3, Template: Options{BlockSize: -1}}, "model server: --block-size: -1, must be from 1 to 2147483647")
}
