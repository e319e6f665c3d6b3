// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"fmt"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"
)

// newMooncakePair is a pair with the legs of one transfer.
func newMooncakePair(t *testing.T, change func(*Options)) (p, d *Engine, prefill, decode string) {
	t.Helper()
	o := pairOptions
	o.Connector = "mooncake"
	change(&o)
	p, d = newPair(t, o)
	for _, one := range dialects() {
		if one.connector == "mooncake" {
			prefill = complete(prompt(200, 1), 1, `,"kv_transfer_params":`+one.ask)
			decode = complete(prompt(200, 1), 4, extra(t, one.tell(t, p, reply{})))
		}
	}
	return p, d, prefill, decode
}

// bootstrapURL is where an engine's bootstrap server is.
func bootstrapURL(e *Engine) string {
	return "http://" + netip.AddrPortFrom(e.Addr().Addr(), uint16(e.BootstrapPort())).String()
}

func query(t *testing.T, e *Engine) reply {
	t.Helper()
	r, err := send(t.Context(), t, http.MethodGet, bootstrapURL(e)+"/query", "")
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestMooncakeBootstrap(t *testing.T) {
	o := pairOptions
	o.Connector, o.Ranks = "mooncake", 2
	e := newEngine(t, o)
	table := func() string {
		ids := e.RankIDs()
		return fmt.Sprintf(`{"0":{"engine_id":"%s"},"1":{"engine_id":"%s"}}`, ids[0], ids[1])
	}
	before := table()
	if r := query(t, e); r.status != http.StatusOK || string(r.body) != before || r.header.Get("Content-Type") != "application/json" {
		t.Errorf("answer: %d %s, want %s", r.status, r.body, before)
	}
	if e.BootstrapPort() == int(e.Addr().Port()) || e.Labels()[labelMooncakePort] != strconv.Itoa(e.BootstrapPort()) {
		t.Errorf("port %d, labels %v", e.BootstrapPort(), e.Labels())
	}
	if b := e.Bodies(); len(b) != 1 || b[0].Phase != phaseQuery {
		t.Errorf("recorded: %+v", b)
	}
	if r, err := send(t.Context(), t, http.MethodGet, bootstrapURL(e)+"/health", ""); err != nil || r.status != http.StatusNotFound {
		t.Errorf("another path: %d, %v", r.status, err)
	}
	if err := e.SetFaults(Faults{Rules: []Fault{{Kind: faultStatus, Phase: phaseQuery, Next: 1}}}); err != nil {
		t.Fatal(err)
	}
	if r := query(t, e); r.status != http.StatusServiceUnavailable {
		t.Errorf("status with a fault: %d", r.status)
	}
	e.Kill()
	if _, err := send(t.Context(), t, http.MethodGet, bootstrapURL(e)+"/query", ""); err == nil {
		t.Error("the bootstrap server outlives the engine")
	}
	if err := e.Restart(); err != nil {
		t.Fatal(err)
	}
	if r := query(t, e); string(r.body) == before || string(r.body) != table() {
		t.Errorf("after a restart: %s, want %s", r.body, table())
	}
}

func TestMooncakeDecodeLegFirst(t *testing.T) {
	p, d, prefill, decode := newMooncakePair(t, func(o *Options) { o.Scale = 1 })
	answer, _ := begin(t, d, decode)
	eventually(t, "decode waits", func() bool { return d.Stats().Deferred == 1 })
	post(t, p, "/v1/completions", prefill)
	if r := <-answer; r.status != http.StatusOK || d.Stats().Pulls != 1 || d.Stats().WrongPulls != 0 {
		t.Errorf("status %d, stats %+v: %s", r.status, d.Stats(), r.body)
	}
	leaks(t, p, 0)
}

func TestMooncakePrefillNeverComes(t *testing.T) {
	for policy, want := range map[string]int{policyFail: 500, policyRecompute: 200} {
		t.Run(policy, func(t *testing.T) {
			t.Parallel()
			p, d, _, decode := newMooncakePair(t, func(o *Options) { o.LoadFailurePolicy = policy })
			start := time.Now()
			r := post(t, d, "/v1/completions", decode)
			if r.status != want || d.Stats().FailedPulls != 1 {
				t.Errorf("status %d, stats %+v", r.status, d.Stats())
			}
			if took, least := time.Since(start), p.current.scaled(mooncakeWait); took < least {
				t.Errorf("given up after %v, want %v", took, least)
			}
			if v := metric(t, d, "vllm:nixl_num_failed_transfers_total"); v != "1.0" {
				t.Errorf("failed transfers: %s", v)
			}
		})
	}
}

func TestMooncakePrefillCancelledWhileDecodeWaits(t *testing.T) {
	t.Parallel()
	p, d, prefill, decode := newMooncakePair(t, func(o *Options) { o.Scale, o.PrefillFixed = 0.1, 10*time.Hour }) // decode waits 3 s
	answer, _ := begin(t, d, decode)
	first, cancel := begin(t, p, prefill)
	eventually(t, "prefill runs", func() bool { return p.Stats().Running == 1 && d.Stats().Deferred == 1 })
	cancel()
	<-first
	eventually(t, "prefill freed", func() bool { return len(p.Held()) == 0 })
	if r := <-answer; r.status != http.StatusInternalServerError {
		t.Errorf("decode: status %d", r.status)
	}
	leaks(t, p, 0)
}

func TestMooncakeDecodeLeavesBeforeThePrefillEnds(t *testing.T) {
	t.Parallel()
	p, d, prefill, decode := newMooncakePair(t, func(o *Options) { o.Scale, o.PrefillFixed = 1, 3*time.Second })
	answer, cancel := begin(t, d, decode)
	first, _ := begin(t, p, prefill)
	eventually(t, "both run", func() bool { return p.Stats().Running == 1 && d.Stats().Deferred == 1 })
	cancel()
	<-answer
	eventually(t, "decode gone", func() bool { return len(d.Held()) == 0 })
	if r := <-first; r.status != http.StatusOK {
		t.Errorf("prefill: status %d", r.status)
	}
	if len(p.Held()) != 0 {
		t.Errorf("kept for nobody: %+v", p.Held())
	}
	leaks(t, p, 0)
}

func TestMooncakePrefillDiesWhileDecodeWaits(t *testing.T) {
	p, d, _, decode := newMooncakePair(t, func(o *Options) { o.Scale = 1 })
	answer, _ := begin(t, d, decode)
	eventually(t, "decode waits", func() bool { return d.Stats().Deferred == 1 })
	start := time.Now()
	p.Kill()
	if r := <-answer; r.status != http.StatusInternalServerError || time.Since(start) > 20*time.Second {
		t.Errorf("status %d after %v", r.status, time.Since(start))
	}
}

func TestMooncakeKeepsOnlyWhatTheLimitEnded(t *testing.T) {
	p, _, prefill, _ := newMooncakePair(t, func(*Options) {})
	r := post(t, p, "/v1/completions", strings.Replace(prefill, `"temperature"`, `"stop":["a","e","i","o","u"],"temperature"`, 1))
	if r.status != http.StatusOK || len(p.Held()) != 0 {
		t.Errorf("status %d, held %+v", r.status, p.Held())
	}
	leaks(t, p, 0)
}

func TestMooncakeTransferIDUsedTwice(t *testing.T) {
	p, d, prefill, decode := newMooncakePair(t, func(*Options) {})
	post(t, p, "/v1/completions", prefill)
	post(t, p, "/v1/completions", prefill)
	if r := post(t, d, "/v1/completions", decode); r.status != http.StatusOK || d.Stats().WrongPulls != 0 {
		t.Errorf("status %d, stats %+v", r.status, d.Stats())
	}
	leaks(t, p, 1) // the first one's
}

func TestMooncakeMissingFieldsAreIgnored(t *testing.T) {
	p, d, _, _ := newMooncakePair(t, func(*Options) {})
	for _, params := range []string{
		`{"do_remote_decode":true}`, `{"do_remote_prefill":true}`, `{"do_remote_prefill":true,"transfer_id":"x","remote_engine_id":"y"}`, `{}`,
	} {
		if r := post(t, d, "/v1/completions", complete(prompt(64, 1), 2, `,"kv_transfer_params":`+params)); r.status != http.StatusOK {
			t.Errorf("%s: status %d", params, r.status)
		}
	}
	if s := d.Stats(); s.InvalidParams != 3 || s.FailedPulls != 0 || s.HeldBlocks != 0 {
		t.Errorf("stats: %+v", s)
	}
	leaks(t, p, 0)
}

func TestMooncakeNoBootstrapServerThere(t *testing.T) {
	p, d, _, _ := newMooncakePair(t, func(*Options) {})
	for _, addr := range []string{"http://127.0.0.1:1", "http://localhost:8998", "://", "http://127.0.0.1", p.URL()} {
		params := map[string]any{"do_remote_prefill": true, "transfer_id": "x", "remote_engine_id": p.ID(), "remote_bootstrap_addr": addr}
		if r := post(t, d, "/v1/completions", complete(prompt(64, 1), 2, extra(t, params))); r.status != http.StatusInternalServerError {
			t.Errorf("%s: status %d", addr, r.status)
		}
	}
}
