// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"context"
	"encoding/json"
	"errors"
	"maps"
	"net/http"
	"strings"
	"testing"
	"time"
)

// dialect is how a router speaks one connector of vLLM.
type dialect struct {
	connector string
	ask       string // kv_transfer_params of the prefill leg
	// tell is kv_transfer_params of the decode leg; answer is the prefill leg's, where one is needed.
	tell     func(t *testing.T, p *Engine, answer reply) map[string]any
	serial   bool           // the decode leg needs the prefill's answer
	wrong    map[string]any // what makes tell's unusable
	stranded bool           // a decode leg that leaves early does not free the prefill's blocks
	told     bool           // one that is refused does
	hold     time.Duration  // before scaling
}

// transferOf is the handle of a prefill answer.
func transferOf(t *testing.T, r reply) map[string]any {
	t.Helper()
	m, ok := r.json(t)["kv_transfer_params"].(map[string]any)
	if !ok {
		t.Fatalf("no handle: %s", r.body)
	}
	return m
}

func dialects() []dialect {
	handle := func(t *testing.T, _ *Engine, answer reply) map[string]any {
		t.Helper()
		return transferOf(t, answer)
	}
	return []dialect{
		{
			connector: "nixl-push", ask: `{"do_remote_decode":true}`, tell: handle, serial: true, told: true,
			wrong: map[string]any{"remote_engine_id": "another"}, hold: 480 * time.Second,
		},
		{
			connector: "moriio", ask: `{"do_remote_decode":true,"transfer_id":"tx-1"}`, tell: handle, serial: true,
			wrong: map[string]any{"remote_engine_id": "another"}, hold: 30 * time.Second,
		},
		{
			connector: "mooncake", ask: `{"do_remote_decode":true,"do_remote_prefill":false,"transfer_id":"xfer-1"}`,
			tell: func(t *testing.T, p *Engine, _ reply) map[string]any {
				t.Helper()
				return map[string]any{
					"do_remote_prefill": true, "do_remote_decode": false, "transfer_id": "xfer-1", "remote_engine_id": p.ID(),
					"remote_bootstrap_addr": bootstrapURL(p),
				}
			},
			wrong: map[string]any{"remote_engine_id": "another"}, hold: 480 * time.Second,
		},
		{
			connector: "offloading", ask: `{"remote_decoder":{"kv_request_id":"kv-1"}}`,
			tell: func(t *testing.T, p *Engine, _ reply) map[string]any {
				t.Helper()
				return map[string]any{"remote_prefiller": map[string]any{
					"kv_request_id": "kv-1", "remote_host": p.Addr().Addr().String(), "remote_port": p.P2PPort(),
				}}
			},
			wrong: map[string]any{"remote_prefiller": map[string]any{
				"kv_request_id": "kv-2", "remote_host": "127.0.0.1", "remote_port": firstSidePort,
			}},
			stranded: true, hold: 60 * time.Second,
		},
	}
}

// extra is kv_transfer_params as a field of a body.
func extra(t *testing.T, params map[string]any) string {
	t.Helper()
	b, err := json.Marshal(params)
	if err != nil {
		t.Fatal(err)
	}
	return `,"kv_transfer_params":` + string(b)
}

// prefill sends the prefill leg of a prompt.
func (d dialect) prefill(t *testing.T, p *Engine, prompt string) reply {
	t.Helper()
	r := post(t, p, "/v1/completions", complete(prompt, 1, `,"kv_transfer_params":`+d.ask))
	if r.status != http.StatusOK {
		t.Fatalf("prefill: status %d: %s", r.status, r.body)
	}
	return r
}

// begin sends a request that is waited for with the channel; its client leaves with cancel.
func begin(t *testing.T, e *Engine, body string) (answer <-chan reply, cancel func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(cancel)
	out := make(chan reply, 1)
	go func() {
		r, err := send(ctx, t, http.MethodPost, e.URL()+"/v1/completions", body)
		r.err = errors.Join(r.err, err)
		out <- r
	}()
	return out, cancel
}

// options are those of a pair that speaks the dialect.
func (d dialect) options() Options {
	o := pairOptions
	o.Connector = d.connector
	return o
}

// leaks ends every lease and wants that many of them unclaimed, each accounted for.
func leaks(t *testing.T, e *Engine, want int) {
	t.Helper()
	if want > 0 {
		eventually(t, "leases end", func() bool {
			e.JumpClock(1000 * time.Hour)
			return len(e.Leaked()) >= want && e.Stats().Leases == 0
		})
	}
	settle(t, e)
	if got := e.Leaked(); len(got) != want {
		t.Errorf("%d leaks, want %d: %+v", len(got), want, got)
	}
	for _, l := range e.Leaked() {
		if l.Reason == "" || l.RequestID == "" || l.Blocks == 0 {
			t.Errorf("leak without account: %+v", l)
		}
	}
}

func TestWireEqualsAggregated(t *testing.T) {
	for _, d := range dialects() {
		t.Run(d.connector, func(t *testing.T) {
			t.Parallel()
			o := d.options()
			p, dec := newPair(t, o)
			want := text(t, post(t, dec, "/v1/completions", complete(prompt(200, 1), 12, `,"cache_salt":"other"`)))
			first := d.prefill(t, p, prompt(200, 1))
			if held := p.Held(); len(held) != 1 || held[0].Blocks != 7 || held[0].State != "lease" {
				t.Fatalf("held by the prefill engine: %+v", held)
			}
			r := post(t, dec, "/v1/completions", complete(prompt(200, 1), 12, extra(t, d.tell(t, p, first))))
			if got := text(t, r); got != want {
				t.Errorf("disaggregated %q, aggregated %q", got, want)
			}
			if len(p.Held()) != 0 {
				t.Errorf("held after the fetch: %+v", p.Held())
			}
			pulls := dec.Pulls()
			if len(pulls) != 1 || pulls[0].From != "p" || pulls[0].To != "d" || pulls[0].Tokens != 200 || pulls[0].Blocks != 7 || pulls[0].Wrong || pulls[0].RequestID == "" {
				t.Errorf("pulls: %+v", pulls)
			}
			if b := append(p.Bodies(), dec.Bodies()...); b[0].Phase != phasePrefill || b[len(b)-1].Phase != phaseTransfer {
				t.Errorf("phases: %s, %s", b[0].Phase, b[len(b)-1].Phase)
			}
			leaks(t, p, 0)
		})
	}
}

func TestWireHoldTimes(t *testing.T) {
	for _, d := range dialects() {
		t.Run(d.connector, func(t *testing.T) {
			t.Parallel()
			o := d.options()
			o.Lease, o.Scale = 0, 1
			p, _ := newPair(t, o)
			d.prefill(t, p, prompt(200, 1))
			held := p.Held()
			if len(held) != 1 {
				t.Fatalf("held: %+v", held)
			}
			if got := held[0].Expires.Sub(held[0].Since); got != d.hold {
				t.Errorf("held for %v, want %v", got, d.hold)
			}
			p.JumpClock(d.hold)
			leaks(t, p, 1)
		})
	}
}

func TestWireDecodeNeverComes(t *testing.T) {
	for _, d := range dialects() {
		t.Run(d.connector, func(t *testing.T) {
			t.Parallel()
			o := d.options()
			o.Lease = 10 * time.Second // 100 ms
			p, _ := newPair(t, o)
			d.prefill(t, p, prompt(200, 1))
			settle(t, p)
			leaks(t, p, 1)
			if v := metric(t, p, "vllm:nixl_num_kv_expired_reqs_total"); v != "1.0" {
				t.Errorf("expired: %s", v)
			}
		})
	}
}

func TestWirePrefillCancelled(t *testing.T) {
	for _, d := range dialects() {
		t.Run(d.connector, func(t *testing.T) {
			t.Parallel()
			o := d.options()
			o.PrefillFixed = time.Hour
			p, _ := newPair(t, o)
			answer, cancel := begin(t, p, complete(prompt(200, 1), 1, `,"kv_transfer_params":`+d.ask))
			eventually(t, "prefill runs", func() bool { return p.Stats().Running == 1 })
			cancel()
			<-answer
			leaks(t, p, 0)
			eventually(t, "abort", func() bool { return len(p.Aborts()) == 1 })
		})
	}
}

func TestWireDecodeCancelledInTheQueue(t *testing.T) {
	for _, d := range dialects() {
		t.Run(d.connector, func(t *testing.T) {
			t.Parallel()
			o := d.options()
			o.MaxNumSeqs = 1
			o.InterToken = time.Hour
			p, dec := newPair(t, o)
			busy, stop := begin(t, dec, complete(prompt(64, 5), 1000, ""))
			eventually(t, "busy", func() bool { return dec.Stats().Running == 1 })
			first := d.prefill(t, p, prompt(200, 1))
			answer, cancel := begin(t, dec, complete(prompt(200, 1), 4, extra(t, d.tell(t, p, first))))
			eventually(t, "queued", func() bool { return dec.Stats().Waiting == 1 })
			cancel()
			<-answer
			want := 0
			if d.stranded {
				want = 1
			}
			leaks(t, p, want)
			stop()
			<-busy
		})
	}
}

func TestWireDecodeRefused(t *testing.T) {
	for _, d := range dialects() {
		t.Run(d.connector, func(t *testing.T) {
			t.Parallel()
			o := d.options()
			p, dec := newPair(t, o)
			first := d.prefill(t, p, prompt(200, 1))
			r := post(t, dec, "/v1/completions", complete(prompt(200, 1), 4, `,"min_tokens":99`+extra(t, d.tell(t, p, first))))
			if r.status != http.StatusBadRequest {
				t.Fatalf("status %d: %s", r.status, r.body)
			}
			want := 1
			if d.told {
				want = 0
			}
			leaks(t, p, want)
		})
	}
}

func TestWirePrefillRestartsBetweenTheLegs(t *testing.T) {
	for _, d := range dialects() {
		t.Run(d.connector, func(t *testing.T) {
			t.Parallel()
			o := d.options()
			for _, policy := range []string{policyFail, policyRecompute} {
				o.LoadFailurePolicy = policy
				p, dec := newPair(t, o)
				told := extra(t, d.tell(t, p, d.prefill(t, p, prompt(200, 1))))
				id, port := p.ID(), p.BootstrapPort()
				if err := p.Restart(); err != nil {
					t.Fatal(err)
				}
				if p.ID() == id || p.BootstrapPort() != port {
					t.Errorf("engine id %s, was %s; bootstrap port %d, was %d", p.ID(), id, p.BootstrapPort(), port)
				}
				checkFailed(t, dec, policy, told)
			}
		})
	}
}

func TestWireWrongID(t *testing.T) {
	for _, d := range dialects() {
		t.Run(d.connector, func(t *testing.T) {
			t.Parallel()
			o := d.options()
			for _, policy := range []string{policyFail, policyRecompute} {
				o.LoadFailurePolicy = policy
				p, dec := newPair(t, o)
				told := d.tell(t, p, d.prefill(t, p, prompt(200, 1)))
				maps.Copy(told, d.wrong)
				checkFailed(t, dec, policy, extra(t, told))
				leaks(t, p, 1)
			}
		})
	}
}

// checkFailed checks what a decode engine makes of a transfer that cannot work.
func checkFailed(t *testing.T, dec *Engine, policy, told string) {
	t.Helper()
	want := map[string]int{policyFail: http.StatusInternalServerError, policyRecompute: http.StatusOK}[policy]
	aggregated := text(t, post(t, dec, "/v1/completions", complete(prompt(200, 1), 4, `,"cache_salt":"s"`)))
	r := post(t, dec, "/v1/completions", complete(prompt(200, 1), 4, told))
	if r.status != want {
		t.Errorf("policy %s: status %d: %s", policy, r.status, r.body)
	}
	if r.status == http.StatusOK && text(t, r) != aggregated {
		t.Errorf("recomputed %q, want %q", text(t, r), aggregated)
	}
	if s := dec.Stats(); s.FailedPulls != 1 || s.WrongPulls != 0 || !s.Alive {
		t.Errorf("stats: %+v", s)
	}
}

func TestWireGenerateAPICarriesParamsInExtraArgs(t *testing.T) {
	for _, d := range dialects() {
		t.Run(d.connector, func(t *testing.T) {
			t.Parallel()
			o := d.options()
			o.ScaleOut = true
			p, _ := newPair(t, o)
			r := post(t, p, "/inference/v1/generate", `{"model":"tiny","token_ids":`+prompt(64, 1)+
				`,"sampling_params":{"max_tokens":1,"extra_args":{"kv_transfer_params":`+d.ask+`}}}`)
			if r.status != http.StatusOK || len(p.Held()) != 1 {
				t.Errorf("status %d, held %+v: %s", r.status, p.Held(), r.body)
			}
			if n := strings.Count(string(r.body), `"kv_transfer_params"`); n != 1 {
				t.Errorf("kv_transfer_params %d times in the answer: %s", n, r.body)
			}
			leaks(t, p, 1)
		})
	}
}

func TestWireFieldsOfAWrongType(t *testing.T) {
	for _, d := range dialects() {
		t.Run(d.connector, func(t *testing.T) {
			t.Parallel()
			e := newEngine(t, d.options())
			for _, params := range []string{
				`7`, `{"do_remote_decode":[],"remote_decoder":5}`,
				`{"transfer_id":{},"do_remote_decode":[],"remote_decoder":{"kv_request_id":[]}}`,
			} {
				r := post(t, e, "/v1/completions", complete(prompt(64, 1), 1, `,"kv_transfer_params":`+params))
				if r.status != http.StatusBadRequest && d.connector != connectorPush { // NIXL looks only when it transfers
					t.Errorf("%s: status %d: %s", params, r.status, r.body)
				}
			}
			if !e.Alive() {
				t.Errorf("deaths: %+v", e.Deaths())
			}
			leaks(t, e, 0)
		})
	}
}
