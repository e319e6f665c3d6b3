// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"
)

// pairOptions are those of a pair whose leases end only by leaks or with the test, however slow the machine.
var pairOptions = Options{BlockSize: 32, NumBlocks: 400, Lease: 10 * time.Hour}

func TestDisaggregatedEqualsAggregated(t *testing.T) {
	p, d := newPair(t, pairOptions)
	want := text(t, post(t, d, "/v1/completions", complete(prompt(200, 1), 12, `,"cache_salt":"other"`)))
	h := prefillLeg(t, p, prompt(200, 1), "")
	if held := p.Held(); len(held) != 1 || held[0].Blocks != 7 || held[0].State != "lease" {
		t.Fatalf("held by the prefill engine: %+v", held)
	}
	got := text(t, post(t, d, "/v1/completions", complete(prompt(200, 1), 12, withHandle(h))))
	if got != want {
		t.Errorf("disaggregated %q, aggregated %q", got, want)
	}
	if held := p.Held(); len(held) != 0 {
		t.Errorf("still held: %+v", held)
	}
	pulls := d.Pulls()
	if len(pulls) != 1 || pulls[0].Tokens != 200 || pulls[0].Bytes != 458752 || pulls[0].Wrong || !pulls[0].Verbatim || pulls[0].From != "p" {
		t.Errorf("pulls: %+v", pulls)
	}
	if s := d.Stats(); s.RemoteTokens != 200 || s.PulledTokens != 200 {
		t.Errorf("stats: %+v", s)
	}
	if n := len(p.Leaked()); n != 0 {
		t.Errorf("%d leaks", n)
	}
}

func TestChatStreamedDecodeLeg(t *testing.T) {
	p, d := newPair(t, pairOptions)
	body := func(extra string) string {
		return `{"model":"tiny","messages":[{"role":"user","content":"` + strings.Repeat("tell me ", 50) + `"}],"temperature":0` + extra + `}`
	}
	r := post(t, p, "/v1/chat/completions", body(`,"max_tokens":1`+askHandle))
	kv, err := json.Marshal(r.json(t)["kv_transfer_params"])
	if err != nil {
		t.Fatal(err)
	}
	got := post(t, d, "/v1/chat/completions", body(`,"max_tokens":6,"stream":true,"stream_options":{"include_usage":true}`+withHandle(string(kv))))
	if got.status != http.StatusOK || strings.Contains(string(got.body), "kv_transfer_params") || !strings.HasSuffix(string(got.body), "data: [DONE]\n\n") {
		t.Fatalf("stream: %s", got.body)
	}
	if s := d.Stats(); s.Pulls != 1 || s.WrongPulls != 0 {
		t.Errorf("stats: %+v", s)
	}
}

func TestHandleTwice(t *testing.T) {
	p, d := newPair(t, pairOptions)
	h := prefillLeg(t, p, prompt(200, 1), "")
	first := text(t, post(t, d, "/v1/completions", complete(prompt(200, 1), 12, withHandle(h))))
	second := text(t, post(t, d, "/v1/completions", complete(prompt(200, 1), 12, `,"cache_salt":"s2"`+withHandle(h))))
	if first != second {
		t.Errorf("first %q, second %q", first, second)
	}
	if v := metric(t, p, "vllm:nixl_num_notifications_after_expiry_total"); v != "1.0" {
		t.Errorf("notifications after expiry: %s", v)
	}
}

func TestStaleHandleGivesAnotherPromptsText(t *testing.T) {
	o := pairOptions
	o.NumBlocks = 40 // so that a few prompts reuse every block
	p, d := newPair(t, o)
	want := text(t, post(t, d, "/v1/completions", complete(prompt(200, 1), 12, `,"cache_salt":"other"`)))
	h := prefillLeg(t, p, prompt(200, 1), "")
	leaks(t, p, 1)
	if l := p.Leaked(); len(l) != 1 || l[0].Blocks != 7 || metric(t, p, "vllm:nixl_num_kv_expired_reqs_total") != "1.0" {
		t.Fatalf("leaks: %+v", l)
	}
	if got := text(t, post(t, d, "/v1/completions", complete(prompt(200, 1), 12, `,"cache_salt":"a"`+withHandle(h)))); got != want {
		t.Errorf("blocks not reused yet: %q, want %q", got, want)
	}
	for i := range 6 {
		post(t, p, "/v1/completions", complete(prompt(250, 10+i), 1, ""))
	}
	got := text(t, post(t, d, "/v1/completions", complete(prompt(200, 1), 12, `,"cache_salt":"b"`+withHandle(h))))
	if got == want || strings.ToUpper(got) != got {
		t.Errorf("text from reused blocks: %q", got)
	}
	if s := d.Stats(); s.WrongPulls != 1 {
		t.Errorf("stats: %+v", s)
	}
}

// TestMisuse is what a real vLLM 0.32 does when it is misused.
func TestMisuse(t *testing.T) {
	tests := []struct {
		name     string
		prefill  string // fields of the prefill leg
		decode   string // prompt of the decode leg; default the prefilled one
		edit     map[string]any
		handle   string
		policy   string
		status   int
		dies     bool
		wrong    bool
		leaks    int
		released bool // the handle's lease ends with the decode leg
	}{
		{name: "as it should be", status: 200, released: true},
		{name: "wrong engine id", edit: map[string]any{"remote_engine_id": "00000000-0000-0000-0000-000000000000"}, status: 500, leaks: 1},
		{name: "wrong port", edit: map[string]any{"remote_port": 18999}, status: 500, leaks: 1},
		{name: "wrong host", edit: map[string]any{"remote_host": "127.0.0.77"}, status: 500, leaks: 1},
		{name: "wrong engine id, recompute", edit: map[string]any{"remote_engine_id": "0"}, policy: "recompute", status: 200, leaks: 1},
		{name: "block ids out of range", edit: map[string]any{"remote_block_ids": []any{[]int{90000, 90001, 90002, 90003, 90004, 90005, 90006}}}, status: 500, leaks: 1},
		{name: "no block ids", edit: map[string]any{"remote_block_ids": nil}, status: 500, dies: true, leaks: 1},
		{name: "only do_remote_prefill", handle: `{"do_remote_prefill":true}`, status: 500, dies: true, leaks: 1},
		{name: "null block ids", handle: `{"do_remote_prefill":true,"remote_block_ids":null,"remote_engine_id":"x"}`, status: 500, dies: true, leaks: 1},
		{name: "no host", edit: map[string]any{"remote_host": nil}, status: 200, leaks: 1},
		{name: "empty block list", edit: map[string]any{"remote_block_ids": []any{[]int{}}}, status: 200, leaks: 1},
		{name: "larger tensor parallelism", edit: map[string]any{"tp_size": 2}, status: 500, dies: true, leaks: 1},
		{name: "longer prompt", decode: prompt(300, 1), status: 500, dies: true, leaks: 1},
		{name: "shorter prompt", decode: prompt(100, 1), status: 200, wrong: true, released: true},
		{name: "another prompt", decode: prompt(200, 2), status: 200, wrong: true, released: true},
		{name: "five tokens prefilled", prefill: `,"max_tokens":5`, status: 200, released: true},
		{name: "refused before admission", edit: map[string]any{"remote_host": "127.0.0.1"}, decode: `"x","min_tokens":99`, status: 400, released: true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			o := pairOptions
			o.LoadFailurePolicy = tt.policy
			p, d := newPair(t, o)
			h := prefillLeg(t, p, prompt(200, 1), tt.prefill)
			h = edited(t, h, tt.edit)
			if tt.handle != "" {
				h = tt.handle
			}
			if tt.decode == "" {
				tt.decode = prompt(200, 1)
			}
			want := ""
			if tt.status == 200 {
				want = text(t, post(t, p, "/v1/completions", complete(tt.decode, 12, `,"cache_salt":"ref"`)))
			}
			r := post(t, d, "/v1/completions", complete(tt.decode, 12, withHandle(h)))
			if r.status != tt.status {
				t.Fatalf("status %d, want %d: %s", r.status, tt.status, r.body)
			}
			if tt.status == 200 && (text(t, r) != want) != tt.wrong {
				t.Errorf("text %q, aggregated %q", text(t, r), want)
			}
			if n := len(p.Held()); tt.released && n != 0 {
				t.Errorf("%d holds left: %+v", n, p.Held())
			}
			checkDeath(t, d, tt.dies)
			leaks(t, p, tt.leaks)
		})
	}
}

func checkDeath(t *testing.T, e *Engine, dies bool) {
	t.Helper()
	if !dies {
		if !e.Alive() || len(e.Deaths()) != 0 {
			t.Fatalf("alive %v, deaths %+v", e.Alive(), e.Deaths())
		}
		return
	}
	eventually(t, "death", func() bool { return !e.Alive() && len(e.Deaths()) == 1 })
	_, err := send(t.Context(), t, http.MethodGet, e.URL()+"/health", "")
	if !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("dead engine: %v", err)
	}
	if err := e.Restart(); err != nil {
		t.Fatal(err)
	}
	if r := get(t, e, "/health"); r.status != http.StatusOK {
		t.Errorf("health after restart: %d", r.status)
	}
}

func TestKnownEngineIgnoresHost(t *testing.T) {
	p, d := newPair(t, pairOptions)
	for i, host := range []string{"127.0.0.1", "127.0.0.77"} {
		h := edited(t, prefillLeg(t, p, prompt(200, i), ""), map[string]any{"remote_host": host})
		if r := post(t, d, "/v1/completions", complete(prompt(200, i), 4, withHandle(h))); r.status != http.StatusOK {
			t.Errorf("host %s: status %d", host, r.status)
		}
	}
}

func TestNoRequestIDHangsThenDies(t *testing.T) {
	p, d := newPair(t, pairOptions)
	h := edited(t, prefillLeg(t, p, prompt(200, 1), ""), map[string]any{"remote_request_id": nil})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		_, err := send(ctx, t, http.MethodPost, d.URL()+"/v1/completions", complete(prompt(200, 1), 4, withHandle(h)))
		done <- err
	}()
	eventually(t, "deferred", func() bool { return d.Stats().Deferred == 1 })
	if v := metric(t, d, `vllm:num_requests_waiting_by_reason{engine="0",model_name="tiny",reason="deferred"}`); v != "1.0" {
		t.Errorf("deferred gauge: %s", v)
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("request: %v", err)
	}
	checkDeath(t, d, true)
}

func TestPrefillGone(t *testing.T) {
	for _, policy := range []string{policyFail, policyRecompute} {
		for _, restart := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/restart=%v", policy, restart), func(t *testing.T) {
				t.Parallel()
				o := pairOptions
				o.LoadFailurePolicy = policy
				p, d := newPair(t, o)
				warm := prefillLeg(t, p, prompt(64, 9), "")
				post(t, d, "/v1/completions", complete(prompt(64, 9), 1, withHandle(warm)))
				h := prefillLeg(t, p, prompt(200, 1), "")
				p.Kill()
				if restart {
					if err := p.Restart(); err != nil {
						t.Fatal(err)
					}
				}
				want := map[string]int{policyFail: 500, policyRecompute: 200}[policy]
				r := post(t, d, "/v1/completions", complete(prompt(200, 1), 4, withHandle(h)))
				if r.status != want {
					t.Errorf("status %d, want %d: %s", r.status, want, r.body)
				}
				if s := d.Stats(); s.FailedPulls != 1 || s.WrongPulls != 0 {
					t.Errorf("stats: %+v", s)
				}
			})
		}
	}
}

func TestPrefillLegsWithoutHandle(t *testing.T) {
	tests := []struct {
		name, extra string
		n, leaks    int
		handle      bool
	}{
		{"streamed", `,"stream":true`, 1, 1, false},
		{"n 2", `,"n":2`, 2, 2, true}, // both: the test does not use the handle
		{"stop", `,"stop":["a","e","i","o","u"]`, 1, 1, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p := newEngine(t, pairOptions)
			r := post(t, p, "/v1/completions", complete(prompt(200, 1), 1, askHandle+tt.extra))
			if r.status != http.StatusOK {
				t.Fatalf("status %d: %s", r.status, r.body)
			}
			if has := strings.Contains(string(r.body), "remote_block_ids"); has != tt.handle {
				t.Errorf("handle: %v", has)
			}
			if len(p.Held()) != tt.n {
				t.Errorf("held: %+v", p.Held())
			}
			leaks(t, p, tt.leaks)
		})
	}
}

func TestOldGeneration(t *testing.T) {
	o := pairOptions
	o.Generation, o.Lease = "old", 0
	p, d := newPair(t, o)
	h := prefillLeg(t, p, prompt(200, 1), "")
	if !strings.Contains(h, `"remote_block_ids":[1,2,3,4,5,6,7]`) {
		t.Errorf("handle: %s", h)
	}
	if held := p.Held()[0]; held.Expires.Sub(held.Since) != time.Duration(480*float64(time.Second)*fast) {
		t.Errorf("held from %v to %v", held.Since, held.Expires)
	}
	r := post(t, d, "/v1/completions", complete(prompt(200, 1), 4, withHandle(h)))
	if got := r.json(t)["usage"].(map[string]any)["prompt_tokens_details"].(map[string]any)["cached_tokens"]; got != 200.0 {
		t.Errorf("cached tokens of an old decode engine: %v", got)
	}
	if kv := prefillLeg(t, p, prompt(100, 2), `,"stop":["a","e","i","o","u"]`); kv != "null" || len(p.Held()) != 0 {
		t.Errorf("stop finish: %s, held %+v", kv, p.Held())
	}
	page := string(get(t, p, "/metrics").body)
	if !strings.Contains(page, `vllm:gpu_cache_usage_perc{model_name="tiny"}`) || strings.Contains(page, "by_reason") {
		t.Error("old page has new families")
	}
}

func TestLoopbackHandleIsTheDecodersOwnHost(t *testing.T) {
	o := pairOptions
	o.Peers, o.RemoteHost = NewRegistry(), "localhost"
	o.Name, o.Addr = "p", "127.0.0.2:0"
	p := newEngine(t, o)
	o.Name, o.Addr, o.RemoteHost = "d", "127.0.0.3:0", ""
	d := newEngine(t, o)
	h := prefillLeg(t, p, prompt(200, 1), "")
	if r := post(t, d, "/v1/completions", complete(prompt(200, 1), 4, withHandle(h))); r.status != http.StatusInternalServerError {
		t.Errorf("localhost: status %d", r.status)
	}
	h = edited(t, h, map[string]any{"remote_host": "127.0.0.2"})
	if r := post(t, d, "/v1/completions", complete(prompt(200, 1), 4, withHandle(h))); r.status != http.StatusOK {
		t.Errorf("corrected: status %d", r.status)
	}
}

// TestHeartbeatsKeepALease has the decode leg queued while the lease nears its end. The prefill engine's lease is long, but
// for a jump of its clock that leaves a minute of it; the decode engine's makes the heartbeats frequent.
func TestHeartbeatsKeepALease(t *testing.T) {
	queued := pairOptions
	queued.MaxNumSeqs, queued.InterToken, queued.Lease = 1, 10*time.Second, heartbeats*10*time.Second // 100 ms, and a heartbeat each 100 ms
	p, d := newPairOf(t, pairOptions, queued)
	busy, stop := begin(t, d, complete(prompt(64, 5), 1000, ""))
	eventually(t, "running", func() bool { return d.Stats().Running == 1 })
	h := prefillLeg(t, p, prompt(200, 1), "")
	answer, _ := begin(t, d, complete(prompt(200, 1), 1, withHandle(h)))
	eventually(t, "queued", func() bool { return d.Stats().Waiting == 1 })
	p.JumpClock(time.Duration(float64(time.Until(p.Held()[0].Expires)-time.Minute) / fast))
	end := time.Now().Add(time.Minute)
	eventually(t, "a longer lease", func() bool { held := p.Held(); return len(held) == 1 && held[0].Expires.After(end.Add(time.Minute)) })
	stop()
	<-busy
	if r := <-answer; r.status != http.StatusOK || d.Stats().WrongPulls != 0 || d.Stats().Pulls != 1 {
		t.Errorf("status %d, stats %+v", r.status, d.Stats())
	}
	leaks(t, p, 0)
}

// metric is the value of one sample of the page; without labels the engine's own are meant.
func metric(t *testing.T, e *Engine, sample string) string {
	t.Helper()
	if !strings.Contains(sample, "{") {
		sample += `{engine="0",model_name="tiny"}`
	}
	for line := range strings.Lines(string(get(t, e, "/metrics").body)) {
		if v, ok := strings.CutPrefix(line, sample+" "); ok {
			return strings.TrimSpace(v)
		}
	}
	t.Fatalf("no sample %s", sample)
	return ""
}
