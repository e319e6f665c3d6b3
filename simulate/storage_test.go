// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"
)

// newStore starts a prefill and a decode engine that meet in a store.
func newStore(t *testing.T) (p, d *Engine) {
	t.Helper()
	return newPair(t, Options{Connector: connectorStorage, BlockSize: 16, Seed: 2})
}

func TestSharedStorage(t *testing.T) {
	p, d := newStore(t)
	ask := complete(prompt(200, 1), 6, "")
	want := text(t, post(t, newEngine(t, Options{Seed: 2}), "/v1/completions", ask))
	if r := post(t, p, "/v1/completions", complete(prompt(200, 1), 1, "")); r.status != http.StatusOK || strings.Contains(string(r.body), "remote_") {
		t.Fatalf("prefill: %d %s", r.status, r.body)
	}
	if got := text(t, post(t, d, "/v1/completions", ask)); got != want {
		t.Errorf("decode %q, alone %q", got, want)
	}
	pulls := d.Pulls()
	if len(pulls) != 1 || pulls[0].From != "store" || pulls[0].Tokens != 192 || pulls[0].Wrong {
		t.Errorf("loads: %+v", pulls)
	}
	for sample, want := range map[string]string{
		"vllm:external_prefix_cache_queries_total": "200.0", "vllm:external_prefix_cache_hits_total": "192.0",
		`vllm:prompt_tokens_by_source_total{engine="0",model_name="tiny",source="local_compute"}`:        "8.0",
		`vllm:prompt_tokens_by_source_total{engine="0",model_name="tiny",source="external_kv_transfer"}`: "192.0",
	} {
		if v := metric(t, d, sample); v != want {
			t.Errorf("%s: %s, want %s", sample, v, want)
		}
	}
	// Another salt is another prompt; what the store lost is computed again.
	if got := text(t, post(t, d, "/v1/completions", complete(prompt(200, 1), 6, `,"cache_salt":"x"`))); got != want || len(d.Pulls()) != 1 {
		t.Errorf("another salt: %q, %d loads", got, len(d.Pulls()))
	}
	post(t, p, "/v1/completions", complete(prompt(200, 2), 1, ""))
	p.registry.DropStored()
	if r := post(t, d, "/v1/completions", complete(prompt(200, 2), 6, "")); r.status != http.StatusOK || len(d.Pulls()) != 1 {
		t.Errorf("after eviction: %d, %d loads", r.status, len(d.Pulls()))
	}
	if b := p.Bodies(); b[0].Phase != phasePrefill || d.Bodies()[0].Phase != phasePlain {
		t.Errorf("phases %s, %s", b[0].Phase, d.Bodies()[0].Phase)
	}
}

func TestStoreOutlivesThePrefillEngine(t *testing.T) {
	p, d := newStore(t)
	post(t, p, "/v1/completions", complete(prompt(200, 1), 1, ""))
	p.Kill()
	if r := post(t, d, "/v1/completions", complete(prompt(200, 1), 6, "")); r.status != http.StatusOK || len(d.Pulls()) != 1 {
		t.Errorf("%d, %d loads", r.status, len(d.Pulls()))
	}
}

func TestLoadFromStoreTakesTime(t *testing.T) {
	o := Options{Connector: connectorStorage, TransferFixed: 20 * time.Second, Scale: fast} // 200 ms
	slow := o
	slow.TransferFixed = 200 * patience // twice what a test waits
	p, d := newPairOf(t, slow, o)
	start := time.Now()
	post(t, p, "/v1/completions", complete(prompt(64, 1), 1, ""))
	if took := time.Since(start); took > patience {
		t.Errorf("nothing to load: %v", took)
	}
	start = time.Now()
	post(t, d, "/v1/completions", complete(prompt(64, 1), 1, ""))
	if took := time.Since(start); took < 200*time.Millisecond {
		t.Errorf("load took %v", took)
	}
}

func TestCacheHitThreshold(t *testing.T) {
	p, d := newStore(t)
	post(t, p, "/v1/completions", complete(prompt(100, 1), 1, ""))
	longer := prompt(100, 1)[:len(prompt(100, 1))-1] + "," + prompt(100, 9)[1:] // 96 of 200 tokens are stored
	for _, tt := range []struct {
		threshold string
		finish    string
		tokens    int
	}{{"0.5", finishThreshold, 0}, {"1", finishThreshold, 0}, {"0.48", finishLength, 3}, {"0", finishLength, 3}} {
		for _, path := range []string{"/v1/completions", "/v1/chat/completions"} {
			body := complete(longer, 3, `,"cache_hit_threshold":`+tt.threshold)
			if path != "/v1/completions" {
				if tt.finish != finishThreshold {
					continue
				}
				body = `{"messages":[{"role":"user","content":"never seen before"}],"max_tokens":3,"cache_hit_threshold":` + tt.threshold + `}`
			}
			r := post(t, d, path, body)
			v := r.json(t)
			finish := v["choices"].([]any)[0].(map[string]any)["finish_reason"]
			if n := v["usage"].(map[string]any)["completion_tokens"]; finish != tt.finish || n != float64(tt.tokens) {
				t.Errorf("%s %s: finish %v, %v tokens", path, tt.threshold, finish, n)
			}
			if tt.finish != finishThreshold {
				continue
			}
			r = post(t, d, path, strings.Replace(body, `"max_tokens"`, `"stream":true,"max_tokens"`, 1))
			all := string(r.body)
			if n := strings.Count(all, `"finish_reason":"cache_threshold"`); n != 1 || !strings.HasSuffix(all, "data: [DONE]\n\n") || strings.Count(all, "data: ") > 3 {
				t.Errorf("%s %s streamed: %s", path, tt.threshold, all)
			}
		}
		if len(d.Held()) != 0 {
			t.Errorf("%s: held %v", tt.threshold, d.Held())
		}
	}
	for _, bad := range []string{"1.5", "-1", `"x"`} {
		if r := post(t, d, "/v1/completions", complete(longer, 3, `,"cache_hit_threshold":`+bad)); r.status != http.StatusBadRequest {
			t.Errorf("%s: %d", bad, r.status)
		}
	}
}

// specOf is disagg_spec of an engine, with the ports of eight ranks.
func specOf(e *Engine, id string) string {
	a, b := e.running().receiverPorts()
	return fmt.Sprintf(`,"kv_transfer_params":{"ret_first_tok":true,"disagg_spec":{"req_id":%q,"receiver_host":%q,"receiver_init_port":[%d,%d],"receiver_alloc_port":%d}}`,
		id, e.Addr().Addr(), a, a+1, b)
}

func TestLMCachePD(t *testing.T) {
	p, d := newPair(t, Options{Connector: connectorLMCache, BlockSize: 16, Seed: 2, Lease: 10 * time.Hour})
	if a, b := d.Labels()[labelInitPort], d.Labels()[labelDataPort]; a != "7301" || b != "17401" {
		t.Errorf("ports %s, %s", a, b)
	}
	ask := complete(prompt(200, 1), 6, `,"return_token_ids":true`)
	alone := post(t, newEngine(t, Options{Seed: 2}), "/v1/completions", ask)
	r := post(t, p, "/v1/completions", complete(prompt(200, 1), 1, specOf(d, "r1")))
	first := alone.json(t)["choices"].([]any)[0].(map[string]any)["token_ids"].([]any)[0]
	if got := r.json(t)["kv_transfer_params"]; fmt.Sprint(got) != fmt.Sprint(map[string]any{"first_tok": first}) {
		t.Errorf("prefill answers %v, first token %v", got, first)
	}
	if h := d.Held(); len(h) != 1 || h[0].State != "buffer" || h[0].Blocks != 12 || h[0].RemoteRequestID != "r1" || len(p.Held()) != 0 {
		t.Errorf("held by d %+v, by p %+v", h, p.Held())
	}
	if got, want := text(t, post(t, d, "/v1/completions", ask)), text(t, alone); got != want {
		t.Errorf("decode %q, alone %q", got, want)
	}
	if len(d.Held()) != 0 || len(d.Leaked()) != 0 || d.Stats().RemoteTokens != 192 {
		t.Errorf("held %v, leaked %v, %+v", d.Held(), d.Leaked(), d.Stats())
	}
	if b := p.Bodies(); b[0].Phase != phasePrefill {
		t.Errorf("phase %s", b[0].Phase)
	}
	// With the first token appended, as LMCache's own proxy does.
	post(t, p, "/v1/completions", complete(prompt(100, 5), 1, specOf(d, "r2")))
	post(t, d, "/v1/completions", complete(strings.TrimSuffix(prompt(100, 5), "]")+",777]", 2, ""))
	if n := d.Stats().RemoteTokens; n != 192+96 {
		t.Errorf("with a token appended: %d remote tokens", n)
	}
}

func TestLMCacheBufferLeaks(t *testing.T) {
	p, d := newPair(t, Options{Connector: connectorLMCache, BlockSize: 16, Seed: 2})
	post(t, p, "/v1/completions", complete(prompt(200, 1), 1, specOf(d, "r1")))
	settle(t, d)
	if l := d.Leaked(); len(l) != 1 || l[0].Blocks != 12 || l[0].RemoteRequestID != "r1" || !strings.Contains(l[0].Reason, "buffer") {
		t.Errorf("leaks: %+v", l)
	}
}

func TestLMCacheReceiverMustBeRight(t *testing.T) {
	for policy, status := range map[string]int{policyFail: 500, policyRecompute: 200} {
		p, d := newPair(t, Options{Connector: connectorLMCache, LoadFailurePolicy: policy})
		good := specOf(d, "r")
		host := fmt.Sprintf("%q", d.Addr().Addr())
		for name, spec := range map[string]string{
			"host": strings.Replace(good, host, `"10.9.9.9"`, 1), "init port": strings.Replace(good, "730", "930", 1),
			"data port": strings.Replace(good, "174", "194", 1), "no id": strings.Replace(good, `"req_id":"r",`, "", 1),
			"no spec": `,"kv_transfer_params":{"ret_first_tok":true}`,
		} {
			if r := post(t, p, "/v1/completions", complete(prompt(100, 1), 1, spec)); r.status != status {
				t.Errorf("%s, %s: %d %s", policy, name, r.status, r.body)
			}
		}
		if r := post(t, p, "/v1/completions", complete(prompt(100, 1), 1, strings.Replace(good, `"req_id":"r"`, `"req_id":7`, 1))); r.status != http.StatusBadRequest {
			t.Errorf("a number as id: %d", r.status)
		}
		if len(d.Held())+len(d.Leaked()) != 0 || p.Stats().FailedPulls != 5 {
			t.Errorf("held %v, %d failures", d.Held(), p.Stats().FailedPulls)
		}
		d.Kill()
		if r := post(t, p, "/v1/completions", complete(prompt(100, 1), 1, good)); r.status != status {
			t.Errorf("%s, receiver down: %d", policy, r.status)
		}
	}
}
