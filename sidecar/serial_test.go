// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"errors"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/internal/pooltest"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/scheduler"
	"github.com/baton-epp/baton/sidecar/connectors"
)

// handing is a serial wire with a handle.
type handing struct{ x *connectors.Exchange }

func (h handing) Prefill(x *connectors.Exchange, body *inference.Edits) {
	connectors.OneToken(x.Request, body)
	x.Rank, x.Ticket = 5, "minted"
	*h.x = *x
}

func (handing) Answer(*connectors.Exchange, []byte) connectors.Answer {
	return connectors.Answer{Handle: []byte(`{"n":18446744073709551617}`), PromptTokens: 70, CachedTokens: 16}
}

func (handing) Decode(x *connectors.Exchange, handle []byte, body *inference.Edits) {
	if x.Ticket != "minted" || x.Rank != 5 {
		panic("another exchange")
	}
	body.Set("handle", handle)
}

func (handing) Withdraw(x *connectors.Exchange, body *inference.Edits) {
	if x.Ticket != "minted" {
		panic("another exchange")
	}
	body.Remove("handle")
}

func (handing) Pull(x *connectors.Exchange, body *inference.Edits) {
	body.Set("source", []byte(`"`+x.Source.Name+`"`))
}

// serial is a rig with a serial wire.
func serial(t *testing.T, traits connectors.Traits, change func(*config.Disaggregation)) (r *rig, told *connectors.Exchange) {
	t.Helper()
	r, told = newRig(t, change), new(connectors.Exchange)
	traits.Name, traits.APIs = "handing", []inference.API{inference.Completions}
	r.settings.Load().wires[""] = wire{handing{told}, traits}
	return r, told
}

// TestSerialTraits: what a wire claims decides what is counted as lost, and what it needs where decode may go.
func TestSerialTraits(t *testing.T) {
	for _, c := range []struct {
		name            string
		traits          connectors.Traits
		elsewhere, fail bool
		bound           bool
		leaks           float64
	}{
		{"claims", connectors.Traits{Aggregates: true, Claims: true}, false, false, true, 0},
		{"claims, decode elsewhere", connectors.Traits{Aggregates: true, Claims: true}, true, false, true, 0},
		{"for one decode endpoint", connectors.Traits{Aggregates: true, NeedsDecode: true}, true, true, true, 0},
		{"both", connectors.Traits{Aggregates: true, NeedsDecode: true, Claims: true}, true, true, true, 1},
		{"neither", connectors.Traits{Aggregates: true}, true, false, false, 0},
		{"no way back", connectors.Traits{NeedsDecode: true, Claims: true}, true, true, true, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			r, told := serial(t, c.traits, nil)
			d, d2 := r.add("d", "decode", "10.9.9.1:8000"), r.add("d2", "decode", "10.9.9.2:8000")
			var rank string
			j := r.job(inference.Completions, clientBody, d, r.server("p", func(w http.ResponseWriter, req *http.Request) {
				rank = req.Header.Get("X-data-parallel-rank")
				answer("{}")(w, req)
			}))
			out := r.run(j)
			if out.HasHandle != c.traits.Claims || out.Bound() != c.bound || out.Fixed() != c.traits.NeedsDecode || out.CachedTokens != 16 || !out.Delivered() {
				t.Errorf("%+v", out)
			}
			if rank != "5" || told.Decode != d || told.Ports != r.settings.Load().Ports {
				t.Errorf("rank %q, told %+v", rank, told)
			}
			to := d
			if c.elsewhere {
				to = d2
			}
			err := r.Forward(t.Context(), j, out, to)
			r.want(c.leaks, "leaked_prefill_total", "decode_changed")
			r.want(c.leaks, "leaked_prefill_total")
			switch {
			case c.fail && !c.traits.Aggregates:
				if e, ok := errors.AsType[*PhaseError](err); !ok || e.Reason != "decode_changed" || out.Name != "" {
					t.Errorf("%+v, %v", out, err)
				}
			case c.fail:
				if err != nil || out.Name != "fallback-decode_changed" || decodeBody(j) != clientBody {
					t.Errorf("%+v, %v; decode gets %s", out, err, decodeBody(j))
				}
			default:
				if err != nil || out.Name != "disaggregated" || !strings.Contains(decodeBody(j), "18446744073709551617") {
					t.Errorf("%+v, %v; decode gets %s", out, err, decodeBody(j))
				}
			}
		})
	}
}

// TestBlindPrefillIsNotLost: nothing is held for a decode that never comes.
func TestBlindPrefillIsNotLost(t *testing.T) {
	r, _ := serial(t, connectors.Traits{Aggregates: true}, nil)
	j := r.job(inference.Completions, clientBody, r.add("d", "decode", "10.9.9.1:8000"), r.server("p", answer("{}")))
	out := r.run(j)
	r.Abandon(t.Context(), j, out, "client_gone")
	r.run(r.job(inference.Completions, clientBody, j.Decode, r.server("late", raw("HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{"))))
	r.want(0, "leaked_prefill_total")
}

// TestBarsOfAWire: each wire says itself what it cannot carry.
func TestBarsOfAWire(t *testing.T) {
	f := func(body string, traits connectors.Traits, want string) {
		t.Helper()
		r, _ := serial(t, traits, nil)
		j := r.job(inference.Completions, body, r.add("d", "decode", "10.9.9.1:8000"), r.server("p", answer("{}")))
		if out := r.run(j); out.Name != want {
			t.Errorf("%s: %s, want %s", body, out.Name, want)
		}
	}
	echo, best := `{"model":"m","prompt":"x","echo":true}`, `{"model":"m","prompt":"x","best_of":3}`
	bars := connectors.Traits{Aggregates: true, Bars: inference.BarEcho}
	f(echo, bars, "aggregated")
	f(best, bars, "disaggregated")
	f(`{"model":"m","prompt":"x","n":2}`, bars, "disaggregated")
	bars.OneChoice = true
	f(`{"model":"m","prompt":"x","n":2}`, bars, "aggregated")
	f(`{"model":"m","prompt":"x","n":1}`, bars, "disaggregated")
}

// TestNeedsPrefill: a decode endpoint without a way back, that says of itself that it only decodes.
func TestNeedsPrefill(t *testing.T) {
	f := func(mode, role string, sidecar pool.Sidecar, aggregates, want bool) {
		t.Helper()
		r, _ := serial(t, connectors.Traits{Aggregates: aggregates}, func(c *config.Disaggregation) { c.Mode = mode })
		e := pooltest.Snapshot(pooltest.E("d").Role(role)).Endpoints[0]
		e.Sidecar = sidecar
		if got := r.NeedsPrefill(e); got != want {
			t.Errorf("%s %q %v: %v", mode, role, sidecar, got)
		}
	}
	f("auto", "decode", pool.SidecarUnknown, false, true)
	f("orchestrate", "decode", pool.SidecarPresent, false, true)
	f("auto", "decode", pool.SidecarPresent, false, false)
	f("headers", "decode", pool.SidecarUnknown, false, false)
	f("off", "decode", pool.SidecarUnknown, false, false)
	f("auto", "both", pool.SidecarUnknown, false, false)
	f("auto", "", pool.SidecarUnknown, false, false)
	f("auto", "decode", pool.SidecarUnknown, true, false)
}

// TestPull names a third endpoint to whoever computes the prompt, as long as it is there and another one.
func TestPull(t *testing.T) {
	pulls := func(c *config.Disaggregation) { c.PullCachedPrefix = true }
	r, told := serial(t, connectors.Traits{Aggregates: true}, pulls)
	if !r.Pulls() {
		t.Error("no pulls")
	}
	d, source := r.add("d", "decode", "10.9.9.1:8000"), r.add("s", "decode", "10.9.9.3:8000")
	p := r.server("p", answer("{}"))
	for _, c := range []struct {
		name   string
		source *pool.Endpoint
		want   *pool.Endpoint
	}{{"a third one", source, source}, {"the prefiller itself", p, nil}, {"none", nil, nil}, {"one that left", pooltest.Snapshot(pooltest.E("x")).Endpoints[0], nil}} {
		j := r.job(inference.Completions, clientBody, d, p)
		j.Decision.Phase(scheduler.PhasePrefill).Source = c.source
		if out := r.run(j); out.Name != "disaggregated" || told.Source != c.want {
			t.Errorf("%s: %+v", c.name, told.Source)
		}
	}
	alone := func(r *rig, source *pool.Endpoint, to *pool.Endpoint, want string) {
		t.Helper()
		j := r.job(inference.Completions, clientBody, d)
		j.Decision.Phase(scheduler.PhaseDecode).Source = source
		out := r.run(j)
		if err := r.Forward(t.Context(), j, out, to); err != nil || out.Name != "aggregated" || out.Bound() {
			t.Errorf("%+v, %v", out, err)
		}
		if got := strings.Contains(decodeBody(j), `"source":"s"`); got != (want != "") {
			t.Errorf("decode gets %s", decodeBody(j))
		}
	}
	alone(r, source, d, "s")
	alone(r, d, d, "")
	alone(r, nil, d, "")
	r, _ = serial(t, connectors.Traits{Aggregates: true}, nil)
	r.add("s", "decode", "10.9.9.3:8000")
	alone(r, source, d, "")
	if r.Pulls() {
		t.Error("pulls, and nobody asked for that")
	}
	if !newRig(t, nil).settings.Load().PullCachedPrefix && newRig(t, pulls).Pulls() {
		t.Error("nixlv2 cannot pull")
	}
}

// TestPullFromTheEndpointThatDecodes is taken back when decode moved there.
func TestPullFromTheEndpointThatDecodes(t *testing.T) {
	r := newRig(t, func(c *config.Disaggregation) {
		c.PullCachedPrefix, c.KVConnector = true, map[string]string{"": "offloading"}
	})
	d, source := r.add("d", "decode", "10.9.9.1:8000"), r.add("s", "decode", "10.9.9.3:8000")
	for _, to := range []*pool.Endpoint{d, source} {
		j := r.job(inference.Completions, clientBody, d)
		j.Decision.Phase(scheduler.PhaseDecode).Source = source
		out := r.run(j)
		if err := r.Forward(t.Context(), j, out, to); err != nil {
			t.Fatal(err)
		}
		if got := strings.Contains(decodeBody(j), `"remote_kv_source"`); got != (to == d) {
			t.Errorf("%s gets %s", to.Name, decodeBody(j))
		}
	}
}

// TestPace: a prefill shows how fast the endpoint computes, and a transfer that the pair has met.
func TestPace(t *testing.T) {
	r := newRig(t, nil)
	p := r.server("p", func(w http.ResponseWriter, req *http.Request) {
		time.Sleep(20 * time.Millisecond)
		answer(goodAnswer)(w, req)
	})
	d := r.add("d", "decode", "10.9.9.1:8000")
	for range 4 {
		j := r.job(inference.Completions, clientBody, d, p)
		j.Decision.Phase(scheduler.PhasePrefill).Ranked[0].UncachedTokens = 4096
		out := r.run(j)
		_ = r.Forward(t.Context(), j, out, d)
		r.Transferred(t.Context(), out, d, true)
	}
	if speed := p.Pace.TokensPerSecond(); speed <= 0 || speed > 4096/0.02 {
		t.Errorf("%v tokens a second", speed)
	}
	if !d.Warm.Has(p.Slot) {
		t.Error("the pair has met")
	}
	j := r.job(inference.Completions, clientBody, d, p)
	out := r.run(j)
	_ = r.Forward(t.Context(), j, out, d)
	r.Transferred(t.Context(), out, d, false)
	if d.Warm.Has(p.Slot) {
		t.Error("still warm after a failed transfer")
	}
}
