// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"fmt"
	"net/http"
	"testing"
	"time"
)

func offloadOptions() Options {
	o := pairOptions
	o.Connector = "offloading"
	return o
}

// at is an object that names blocks at an engine.
func at(member, id string, e *Engine) string {
	return fmt.Sprintf(`"%s":{"kv_request_id":"%s","remote_host":"%s","remote_port":%d}`, member, id, e.Addr().Addr(), e.P2PPort())
}

const parkKV = `"remote_decoder":{"kv_request_id":"kv-1"}`

func offload(prompt string, maxTokens int, params string) string {
	return complete(prompt, maxTokens, `,"kv_transfer_params":{`+params+`}`)
}

func TestOffloadingFetchWaitsForAPrefillThatRuns(t *testing.T) {
	o := offloadOptions()
	o.Scale, o.PrefillFixed = 1, 100*time.Millisecond // the fetch may wait for 30 s
	p, d := newPair(t, o)
	answer, _ := begin(t, d, offload(prompt(200, 1), 4, at("remote_prefiller", "kv-1", p)))
	eventually(t, "decode waits", func() bool { return d.Stats().Deferred == 1 })
	post(t, p, "/v1/completions", offload(prompt(200, 1), 1, parkKV))
	if r := <-answer; r.status != http.StatusOK || d.Stats().RemoteTokens != 200 {
		t.Errorf("status %d, stats %+v", r.status, d.Stats())
	}
	leaks(t, p, 0)
}

func TestOffloadingLoadDeadline(t *testing.T) {
	for policy, want := range map[string]int{policyFail: 500, policyRecompute: 200} {
		t.Run(policy, func(t *testing.T) {
			t.Parallel()
			o := offloadOptions()
			o.LoadFailurePolicy, o.MaxNumSeqs = policy, 1
			o.InterToken = 10 * time.Second // 100 ms
			p, d := newPair(t, o)
			busy, stop := begin(t, p, complete(prompt(64, 5), 1000, ""))
			eventually(t, "busy", func() bool { return p.Stats().Running == 1 })
			late, _ := begin(t, p, offload(prompt(200, 1), 1, parkKV)) // queued for longer than the deadline
			r := post(t, d, "/v1/completions", offload(prompt(200, 1), 1, at("remote_prefiller", "kv-1", p)))
			if r.status != want || d.Stats().FailedPulls != 1 {
				t.Errorf("status %d, stats %+v", r.status, d.Stats())
			}
			stop()
			<-busy
			<-late
			leaks(t, p, 1) // parked after its fetch had ended
		})
	}
}

func TestOffloadingAbortDoesNotDropWhatIsComputed(t *testing.T) {
	o := offloadOptions()
	o.InterToken = 10 * time.Second // 100 ms
	p, d := newPair(t, o)
	answer, cancel := begin(t, p, offload(prompt(200, 1), 1000, parkKV))
	eventually(t, "decodes", func() bool { return p.Stats().GenerationTokens > 0 })
	cancel()
	<-answer
	eventually(t, "parked", func() bool { h := p.Held(); return len(h) == 1 && h[0].State == "lease" })
	if r := post(t, d, "/v1/completions", offload(prompt(200, 1), 1, at("remote_prefiller", "kv-1", p))); r.status != http.StatusOK {
		t.Errorf("decode: status %d", r.status)
	}
	leaks(t, p, 0)
}

// TestOffloadingTimerIsFixed has the decode leg queued while the prefill's blocks are dropped.
func TestOffloadingTimerIsFixed(t *testing.T) {
	o := offloadOptions()
	o.MaxNumSeqs, o.LoadFailurePolicy = 1, policyRecompute
	o.InterToken = 10 * time.Second // 100 ms
	p, d := newPair(t, o)
	busy, stop := begin(t, d, complete(prompt(64, 5), 1000, ""))
	eventually(t, "busy", func() bool { return d.Stats().Running == 1 })
	post(t, p, "/v1/completions", offload(prompt(200, 1), 1, parkKV))
	answer, _ := begin(t, d, offload(prompt(200, 1), 1, at("remote_prefiller", "kv-1", p)))
	leaks(t, p, 1)
	stop()
	<-busy
	if r := <-answer; r.status != http.StatusOK || d.Stats().Pulls != 0 || d.Stats().FailedPulls != 1 {
		t.Errorf("status %d, stats %+v", r.status, d.Stats())
	}
}

func TestOffloadingHashSeedsMustAgree(t *testing.T) {
	o := offloadOptions()
	o.Peers, o.Name, o.HashSeed = NewRegistry(), "p", "1"
	p := newEngine(t, o)
	o.Name, o.HashSeed = "d", "2"
	d := newEngine(t, o)
	post(t, p, "/v1/completions", offload(prompt(200, 1), 1, parkKV))
	r := post(t, d, "/v1/completions", offload(prompt(200, 1), 1, at("remote_prefiller", "kv-1", p)))
	if pulls := d.Pulls(); r.status != http.StatusInternalServerError || len(pulls) != 1 || pulls[0].Err == "" {
		t.Errorf("status %d, pulls %+v", r.status, pulls)
	}
	leaks(t, p, 1)
}

func TestOffloadingCachedPrefixNotParked(t *testing.T) {
	o := offloadOptions()
	o.CachedNotParked = true
	p, d := newPair(t, o)
	post(t, p, "/v1/completions", complete(prompt(200, 1), 1, ""))
	post(t, p, "/v1/completions", offload(prompt(200, 1), 1, parkKV))
	if len(p.Held()) != 0 {
		t.Errorf("held: %+v", p.Held())
	}
	if r := post(t, d, "/v1/completions", offload(prompt(200, 1), 1, at("remote_prefiller", "kv-1", p))); r.status != http.StatusInternalServerError {
		t.Errorf("decode: status %d", r.status)
	}
}

// newTrio is a prefill and a decode engine and a third one with a cached prompt of 200 tokens, 6 full blocks.
func newTrio(t *testing.T) (p, d, source *Engine) {
	t.Helper()
	o := offloadOptions()
	o.Peers = NewRegistry()
	engines := make([]*Engine, 0, 3)
	for _, name := range []string{"p", "d", "source"} {
		o.Name = name
		engines = append(engines, newEngine(t, o))
	}
	post(t, engines[2], "/v1/completions", complete(prompt(200, 1), 1, ""))
	return engines[0], engines[1], engines[2]
}

func TestOffloadingPullsACachedPrefixFromAThirdPeer(t *testing.T) {
	tests := []struct {
		name, prompt string
		remote       int // tokens that come from the source
	}{
		{"the same prompt", prompt(200, 1), 192},
		{"a longer prompt", prompt(300, 1), 192},
		{"a shorter prompt", prompt(96, 1), 64}, // never the last token
		{"another prompt", prompt(200, 2), 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			_, d, source := newTrio(t)
			want := text(t, post(t, source, "/v1/completions", complete(tt.prompt, 8, `,"cache_salt":"s"`)))
			r := post(t, d, "/v1/completions", offload(tt.prompt, 8, at("remote_kv_source", "own", source)))
			if got := text(t, r); got != want {
				t.Errorf("text %q, want %q", got, want)
			}
			s := d.Stats()
			if s.RemoteTokens != tt.remote || s.WrongPulls != 0 || s.FailedPulls != 0 {
				t.Errorf("stats: %+v", s)
			}
			if tt.remote > 0 && (len(d.Pulls()) != 1 || d.Pulls()[0].From != "source" || d.Pulls()[0].Tokens != tt.remote) {
				t.Errorf("pulls: %+v", d.Pulls())
			}
			if len(source.Held()) != 0 {
				t.Errorf("the source holds %+v", source.Held())
			}
			again := post(t, d, "/v1/completions", complete(tt.prompt, 8, ""))
			if text(t, again) != want {
				t.Errorf("from the cache: %q, want %q", text(t, again), want)
			}
		})
	}
}

func TestOffloadingSourceDownIsAMiss(t *testing.T) {
	_, d, source := newTrio(t)
	body := offload(prompt(200, 1), 4, at("remote_kv_source", "own", source))
	source.Kill()
	if r := post(t, d, "/v1/completions", body); r.status != http.StatusOK || d.Stats().RemoteTokens != 0 {
		t.Errorf("status %d, stats %+v", r.status, d.Stats())
	}
}

func TestOffloadingPrefillWithASource(t *testing.T) {
	p, d, source := newTrio(t)
	want := text(t, post(t, source, "/v1/completions", complete(prompt(200, 1), 8, `,"cache_salt":"s"`)))
	post(t, p, "/v1/completions", offload(prompt(200, 1), 1, parkKV+","+at("remote_kv_source", "own", source)))
	if b := p.Bodies(); b[0].Phase != phasePrefill || p.Stats().RemoteTokens != 192 || len(p.Held()) != 1 {
		t.Errorf("phase %s, stats %+v", b[0].Phase, p.Stats())
	}
	if got := text(t, post(t, d, "/v1/completions", offload(prompt(200, 1), 8, at("remote_prefiller", "kv-1", p)))); got != want {
		t.Errorf("text %q, want %q", got, want)
	}
	leaks(t, p, 0)
}

func TestOffloadingMissingFieldsAreIgnored(t *testing.T) {
	e := newEngine(t, offloadOptions())
	for _, params := range []string{`"remote_prefiller":{}`, `"remote_decoder":{}`, `"remote_kv_source":{"kv_request_id":"x"}`, `"other":1`} {
		if r := post(t, e, "/v1/completions", offload(prompt(64, 1), 1, params)); r.status != http.StatusOK {
			t.Errorf("%s: status %d", params, r.status)
		}
	}
	if s := e.Stats(); s.InvalidParams != 3 || s.HeldBlocks != 0 {
		t.Errorf("stats: %+v", s)
	}
}
