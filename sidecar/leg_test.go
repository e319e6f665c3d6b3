// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/sidecar/connectors"
)

// TestLegRunsBesideDecode follows a request whose legs run at once from the first to the last checkpoint.
func TestLegRunsBesideDecode(t *testing.T) {
	p := newParty(t, waiting(), nil)
	pe, say, got := p.holding("p")
	j, out := p.begin(pe)
	if !out.HasHandle || out.Prefiller != pe || out.CachedTokens != -1 || len(out.Attempts) != 0 {
		t.Errorf("%+v", out)
	}
	if !strings.Contains(decodeBody(j), `"room":"room-1"`) || !strings.Contains(decodeBody(j), `"from":"p"`) {
		t.Errorf("decode gets %s", decodeBody(j))
	}
	if age := time.Until(out.HandleUntil); age > 25*time.Second || age < 20*time.Second {
		t.Errorf("to be used within %v", age)
	}
	if err := p.Forward(t.Context(), j, out, p.d); err != nil || out.Checkpoint != DecodeForwarded {
		t.Fatalf("%+v, %v", out, err)
	}
	p.forgetBody(j)
	if pe.Load.Requests() != 1 || p.metric("in_flight", "prefill") != 1 {
		t.Error("the leg holds nothing")
	}
	select {
	case <-out.Pending():
		t.Fatal("over before it was answered")
	default:
	}
	say <- `200 {}`
	p.over(out)
	if err := p.Settle(t.Context(), j, out); err != nil || out.Pending() != nil || reasons(out) != "ok" || out.Checkpoint != PrefillComplete {
		t.Errorf("%+v, %v", out, err)
	}
	if out.PrefillTokens != 77 || out.CachedTokens != 33 {
		t.Errorf("%+v", out)
	}
	p.Transferred(t.Context(), out, p.d, true)
	if out.Checkpoint != TransferComplete {
		t.Errorf("%v", out.Checkpoint)
	}
	p.Leave(j, out, false)
	for _, c := range []string{"PREFILL_SELECTED", "DECODE_FORWARDED", "PREFILL_COMPLETE", "TRANSFER_COMPLETE"} {
		p.want(1, "checkpoints_total", c)
	}
	p.want(1, "attempts_total", "prefill", "ok")
	p.want(1, "phase_duration_seconds", "prefill")
	p.want(0, "leaked_prefill_total")
	p.aborts("")
	if sent := got.all(); !strings.Contains(sent, `"room":"room-1"`) || !strings.Contains(sent, "fifteen") {
		t.Errorf("prefill got %s", sent)
	}
}

// TestLegThatEndsBeforeItsSettling: decode's first byte may come before the prefill's answer is taken over.
func TestTransferBeforeSettling(t *testing.T) {
	p := newParty(t, waiting(), nil)
	pe, say, _ := p.holding("p")
	j, out := p.forward(pe)
	p.Transferred(t.Context(), out, p.d, true)
	say <- `200 {}`
	p.over(out)
	if err := p.Settle(t.Context(), j, out); err != nil || out.Checkpoint != TransferComplete {
		t.Errorf("%v, %v", out.Checkpoint, err)
	}
	p.want(1, "checkpoints_total", "PREFILL_COMPLETE")
}

// TestLegFailsBeforeDecode walks on to the next prefiller, into a new room.
func TestLegFailsBeforeDecode(t *testing.T) {
	big := strings.Replace(clientBody, "one", "one"+strings.Repeat(" more", 4<<20), 1)
	for _, c := range []struct {
		name, want, room string
		first            func(p *party) *pool.Endpoint
	}{
		{"refused", "refused", "room-2", func(p *party) *pool.Endpoint { return p.refusing("bad") }},
		{"answered before the request was read", "", "room-2", func(p *party) *pool.Endpoint {
			return p.server("bad", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusServiceUnavailable) })
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newParty(t, waiting(), nil)
			good, say, _ := p.holding("good")
			j := p.job(inference.Completions, big, p.d, c.first(p), good)
			out, err := p.Run(t.Context(), j)
			if err != nil || out.Prefiller != good || len(out.Attempts) != 1 || c.want != "" && reasons(out) != c.want {
				t.Fatalf("%+v, %v", out, err)
			}
			if !strings.Contains(decodeBody(j), c.room) {
				t.Error("the room of a failed attempt is used again")
			}
			_ = p.Forward(t.Context(), j, out, p.d)
			say <- `200 {}`
			p.over(out)
			if err := p.Settle(t.Context(), j, out); err != nil || len(out.Attempts) != 2 || out.Attempts[1].Number != 2 {
				t.Errorf("%+v, %v", out.Attempts, err)
			}
			p.want(1, "retries_total")
		})
	}
}

// TestNoLeg: nobody could be asked.
func TestNoLeg(t *testing.T) {
	p := newParty(t, waiting(), nil)
	out, err := p.Run(t.Context(), p.job(inference.Completions, clientBody, p.d, p.refusing("a"), p.refusing("b"), p.refusing("c")))
	if pe, ok := errors.AsType[*PhaseError](err); !ok || pe.Attempt != 2 || pe.Reason != "refused" || reasons(out) != "refused refused" {
		t.Errorf("%s, %v", reasons(out), err)
	}
	p.idle()
	p.aborts("")

	p = newParty(t, helping(), nil)
	j := p.job(inference.Completions, clientBody, p.d, p.refusing("a"))
	if out := p.run(j); out.Name != "fallback-refused" || decodeBody(j) != clientBody || out.Bound() || out.Pending() != nil {
		t.Errorf("%+v; decode gets %s", out, decodeBody(j))
	}

	p = newParty(t, waiting(), func(c *config.Disaggregation) { c.RetryBudget = config.RetryBudget{} })
	good, _, got := p.holding("good")
	if _, err := p.Run(t.Context(), p.job(inference.Completions, clientBody, p.d, p.refusing("a"), good)); err == nil || got.all() != "" {
		t.Errorf("%v: went on without a retry left", err)
	}
	p.want(1, "retries_refused_total")
}

// TestLegFailsAfterForward: decode waits in vain and is told so, once; where it helps itself, that is a fallback.
func TestLegFailsAfterForward(t *testing.T) {
	for _, c := range []struct {
		say, reason string
		status      int
	}{
		{"500 {}", "status_5xx", 500},
		{"429 {}", "overloaded", 429},
		{"400 {}", "rejected", 400},
		{"404 {}", "not_found", 404},
		{"200 <html>", "malformed", 200},
		{`200 {"abort"}`, "engine_error", 200},
		{`200 {"ended by itself"}`, "complete", 200},
		{"reset", "reset", 0},
	} {
		t.Run(c.reason, func(t *testing.T) {
			p := newParty(t, waiting(), nil)
			pe, say, _ := p.holding("p")
			j, out := p.forward(pe)
			say <- c.say
			p.over(out)
			err := p.Settle(t.Context(), j, out)
			if e, ok := errors.AsType[*PhaseError](err); !ok || e.Reason != c.reason || e.Status != c.status || e.Attempt != 1 || e.Endpoint != pe.Hostport {
				t.Errorf("%v", err)
			}
			if reasons(out) != c.reason || out.Name != "" || out.HasHandle || out.Pending() != nil {
				t.Errorf("%+v", out)
			}
			p.Leave(j, out, false)
			p.aborts(`{"rid":"room-1"}`)
			p.want(1, "aborts_total", "ok")
			p.want(1, "attempts_total", "prefill", c.reason)
			p.want(0, "leaked_prefill_total")
			p.want(0, "checkpoints_total", "PREFILL_COMPLETE")
			if p.decoded.paths[0] != "/abort_request" || p.decoded.heads[0].Get(HeaderDepth) != "1" || p.decoded.heads[0].Get("X-Request-Id") != "req-1" {
				t.Errorf("%v %v", p.decoded.paths, p.decoded.heads)
			}

			p = newParty(t, helping(), nil)
			pe, say, _ = p.holding("p")
			j, out = p.forward(pe)
			say <- c.say
			p.over(out)
			if err := p.Settle(t.Context(), j, out); err != nil || out.Name != "fallback-"+c.reason || out.HasHandle {
				t.Errorf("%+v, %v", out, err)
			}
			p.Transferred(t.Context(), out, p.d, true) // of a prompt that decode computed itself
			p.Leave(j, out, false)
			p.want(1, "fallbacks_total", c.reason)
			p.want(0, "checkpoints_total", "TRANSFER_COMPLETE")
			p.aborts("")
		})
	}
}

// TestLegLimits: a leg ends with the phase's timeout, with the budget and with the orchestrator.
func TestLegLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, func(c *config.Disaggregation) { c.Prefill.Timeout, c.Budget = time.Minute, 90*time.Second })
		r.settings.Load().wires[""] = wire{meeting{newRooms()}, waiting()}
		net := r.bubble()
		hanging := net.server("p", hang)
		d := net.server("d", func(http.ResponseWriter, *http.Request) {})
		d.Role = pool.RoleDecode
		f := func(spent time.Duration, want error, reason string, after time.Duration) {
			t.Helper()
			start := time.Now()
			j := r.job(inference.Completions, clientBody, d, hanging)
			j.Start = start.Add(-spent)
			out, err := r.Run(t.Context(), j)
			if err != nil {
				t.Fatal(err)
			}
			_ = r.Forward(t.Context(), j, out, d)
			<-out.Pending()
			if took := time.Since(start); took != after {
				t.Errorf("over after %v, want %v", took, after)
			}
			err = r.Settle(t.Context(), j, out)
			if want != nil && !errors.Is(err, want) || err == nil || reasons(out) != reason {
				t.Errorf("%v, %s", err, reasons(out))
			}
			r.background.Wait()
			r.idle()
		}
		f(0, nil, "timeout", time.Minute)
		f(80*time.Second, ErrBudgetSpent, "budget", 10*time.Second)

		j := r.job(inference.Completions, clientBody, d, hanging)
		out, err := r.Run(t.Context(), j)
		if err != nil {
			t.Fatal(err)
		}
		r.Close()
		<-out.Pending()
		r.idle()
	})
}

// TestBudgetBeforeTheLegIsOnItsWay ends the wait for it.
func TestBudgetBeforeTheLegIsOnItsWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, func(c *config.Disaggregation) { c.Budget, c.Prefill.MaxConcurrentPerEndpoint = 10*time.Second, 1 })
		r.settings.Load().wires[""] = wire{meeting{newRooms()}, waiting()}
		net := r.bubble()
		p := net.server("p", hang)
		d := r.add("d", "decode", "10.9.9.9:8000")
		first := r.job(inference.Completions, clientBody, d, p)
		out, err := r.Run(t.Context(), first)
		if err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		j := r.job(inference.Completions, clientBody, d, p)
		j.Start = start.Add(-5 * time.Second)
		if _, err := r.Run(t.Context(), j); !errors.Is(err, ErrBudgetSpent) || time.Since(start) != 5*time.Second {
			t.Errorf("%v after %v", err, time.Since(start))
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := r.Run(ctx, r.job(inference.Completions, clientBody, d, p)); !errors.Is(err, context.Canceled) {
			t.Errorf("%v", err)
		}
		r.Leave(first, out, false)
		r.background.Wait()
		r.idle()
	})
}

// TestLegWithHeldBody: a body that takes long to send does not hold decode up for longer than a connection may take.
func TestLegWithHeldBody(t *testing.T) {
	p := newParty(t, waiting(), nil)
	release := make(chan struct{})
	pe := p.server("p", func(w http.ResponseWriter, req *http.Request) {
		<-release
		respond(w, "200 {}")
		_ = req
	})
	j := p.job(inference.Completions, strings.Replace(clientBody, "one", "one"+strings.Repeat(" more", 8<<20), 1), p.d, pe)
	out, err := p.Run(t.Context(), j)
	if err != nil || out.Pending() == nil {
		t.Fatalf("%+v, %v", out, err)
	}
	_ = p.Forward(t.Context(), j, out, p.d)
	p.forgetBody(j)
	close(release)
	p.over(out)
	p.Leave(j, out, false)
}

// TestParallelLegs runs a serial wire that allows it with both legs at once.
func TestParallelLegs(t *testing.T) {
	traits := helping()
	traits.Shape, traits.Overlaps = connectors.Serial, true
	p := newParty(t, traits, func(c *config.Disaggregation) { c.ParallelLegs = true })
	pe, say, _ := p.holding("p")
	j, out := p.forward(pe)
	say <- `200 {}`
	p.over(out)
	if err := p.Settle(t.Context(), j, out); err != nil {
		t.Error(err)
	}

	p = newParty(t, traits, nil) // off by default
	pe, say, _ = p.holding("p")
	say <- `200 {}`
	if out := p.run(p.job(inference.Completions, clientBody, p.d, pe)); out.Pending() != nil || out.Checkpoint != PrefillComplete || !out.HasHandle {
		t.Errorf("%+v", out)
	}
}
