// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"errors"
	"testing"
	"time"

	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/pool"
)

// cancelled waits until the prefill endpoint saw that its request is over.
func (p *party) cancelled(t *testing.T) {
	t.Helper()
	eventually(t, "prefill cancelled", func() bool { return p.gone.Load() == 1 })
	p.background.Wait()
	p.idle()
	p.want(1, "attempts_total", "prefill", "canceled")
}

// TestClientLeavesBeforeForward cancels the leg; one that is over already has blocks that nobody takes.
func TestClientLeavesBeforeForward(t *testing.T) {
	for _, reason := range []string{"client_gone", "no_decode"} {
		p := newParty(t, waiting(), nil)
		pe, _, _ := p.holding("p")
		j, out := p.begin(pe)
		p.Abandon(t.Context(), j, out, reason)
		p.Leave(j, out, false)
		p.cancelled(t)
		p.want(0, "leaked_prefill_total")
		p.aborts("")
		if out.Pending() != nil || reasons(out) != "canceled" {
			t.Errorf("%+v", out)
		}

		p = newParty(t, waiting(), nil)
		pe, say, _ := p.holding("p")
		j, out = p.begin(pe)
		say <- "200 {}"
		p.over(out)
		p.Abandon(t.Context(), j, out, reason)
		p.Abandon(t.Context(), j, out, reason)
		p.Leave(j, out, false)
		p.want(1, "leaked_prefill_total", reason)
		p.want(1, "leaked_prefill_total")
		p.want(77, "leaked_prefill_tokens_total")
		p.aborts("")
	}
}

// TestClientLeavesAfterForward frees prefill and decode; what decode does with a prefill that is over is its own affair.
func TestClientLeavesAfterForward(t *testing.T) {
	p := newParty(t, waiting(), nil)
	pe, _, _ := p.holding("p")
	j, out := p.forward(pe)
	p.Leave(j, out, false)
	p.Leave(j, out, false)
	p.cancelled(t)
	p.aborts(`{"rid":"room-1"}`)
	p.want(0, "leaked_prefill_total")

	p = newParty(t, waiting(), nil)
	pe, say, _ := p.holding("p")
	j, out = p.forward(pe)
	say <- "200 {}"
	p.over(out)
	p.Leave(j, out, false) // nobody has settled it
	if reasons(out) != "ok" || out.Checkpoint != PrefillComplete {
		t.Errorf("%+v", out)
	}
	p.aborts("")

	p = newParty(t, helping(), nil)
	pe, _, _ = p.holding("p")
	j, out = p.forward(pe)
	p.Transferred(t.Context(), out, p.d, true)
	p.Leave(j, out, false) // after the response's end
	p.cancelled(t)
}

// TestAnswerNotSent: the gateway was not reached with the decode request.
func TestAnswerNotSent(t *testing.T) {
	p := newParty(t, waiting(), nil)
	pe, _, _ := p.holding("p")
	j, out := p.forward(pe)
	p.Abandon(t.Context(), j, out, "not_sent")
	p.Leave(j, out, false)
	p.cancelled(t)
	p.want(0, "leaked_prefill_total")

	p = newParty(t, waiting(), nil)
	pe, say, _ := p.holding("p")
	j, out = p.forward(pe)
	say <- "200 {}"
	p.over(out)
	p.Abandon(t.Context(), j, out, "not_sent")
	p.Leave(j, out, false)
	p.want(1, "leaked_prefill_total", "not_sent")
}

// TestResponseUnseen: the gateway ends the stream before the response, so the leg runs on by itself.
func TestResponseUnseen(t *testing.T) {
	p := newParty(t, waiting(), nil)
	pe, say, _ := p.holding("p")
	j, out := p.forward(pe)
	p.Leave(j, out, true)
	if pe.Load.Requests() != 1 || p.gone.Load() != 0 {
		t.Error("the leg holds nothing")
	}
	say <- "200 {}"
	p.over(out)
	p.want(1, "attempts_total", "prefill", "ok")
	p.want(1, "checkpoints_total", "PREFILL_COMPLETE")
	p.aborts("")

	p = newParty(t, waiting(), nil)
	pe, say, _ = p.holding("p")
	j, out = p.forward(pe)
	p.Leave(j, out, true)
	say <- "500 {}"
	p.over(out)
	p.want(1, "attempts_total", "prefill", "status_5xx")
	p.aborts(`{"rid":"room-1"}`)

	p = newParty(t, helping(), nil)
	pe, say, _ = p.holding("p")
	j, out = p.forward(pe)
	say <- "500 {}"
	<-out.Pending()
	p.Leave(j, out, true) // over already, and not settled
	p.over(out)
	p.want(1, "fallbacks_total", "status_5xx")
}

// TestDecodeFails cancels the prefill that would wait for it.
func TestDecodeFails(t *testing.T) {
	for _, c := range []struct {
		name string
		told func(p *party, j *Job, out *Outcome)
	}{
		{"5xx", func(p *party, _ *Job, out *Outcome) { p.Transferred(p.t.Context(), out, p.d, false) }},
		{"served elsewhere", func(p *party, _ *Job, out *Outcome) {
			p.Transferred(p.t.Context(), out, p.add("d2", "decode", "10.9.9.2:8000"), true)
		}},
		{"refused", func(p *party, j *Job, out *Outcome) { p.Abandon(p.t.Context(), j, out, "refused") }},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newParty(t, waiting(), nil)
			pe, _, _ := p.holding("p")
			p.d.Warm.Add(pe.Slot)
			j, out := p.forward(pe)
			c.told(p, j, out)
			p.cancelled(t)
			if err := p.Settle(t.Context(), j, out); err != nil || out.Pending() != nil || reasons(out) != "canceled" {
				t.Errorf("%+v, %v", out, err)
			}
			p.Leave(j, out, false)
			p.aborts("") // decode has answered
			p.want(0, "leaked_prefill_total")
			p.want(0, "checkpoints_total", "TRANSFER_COMPLETE")
		})
	}
}

// TestDecodeAnsweredBeforeTheLegFailed: a whole answer is an answer; of a stream it is not known what it will be.
func TestDecodeAnsweredBeforeTheLegFailed(t *testing.T) {
	for _, stream := range []bool{false, true} {
		p := newParty(t, waiting(), nil)
		pe, say, _ := p.holding("p")
		j, out := p.forward(pe)
		j.Request.Stream = stream
		p.Transferred(t.Context(), out, p.d, true)
		say <- "500 {}"
		p.over(out)
		if err := p.Settle(t.Context(), j, out); (err != nil) != stream {
			t.Errorf("streamed %v: %v", stream, err)
		}
	}
}

// TestForwardWithdrawsALeg keeps the rules of handles for tickets.
func TestForwardWithdrawsALeg(t *testing.T) {
	for _, c := range []struct {
		reason string
		spoil  func(p *party, j *Job, out *Outcome, say chan<- string) *pool.Endpoint
	}{
		{"handle_expired", func(p *party, _ *Job, out *Outcome, _ chan<- string) *pool.Endpoint {
			out.HandleUntil = time.Now().Add(-time.Second)
			return p.d
		}},
		{"engine_mismatch", func(p *party, _ *Job, _ *Outcome, _ chan<- string) *pool.Endpoint {
			other := p.add("d2", "decode", "10.9.9.2:8000")
			other.Engine = "other"
			p.settings.Load().wires["other"] = wire{}
			return other
		}},
		{"status_5xx", func(p *party, _ *Job, out *Outcome, say chan<- string) *pool.Endpoint {
			say <- "500 {}"
			<-out.Pending()
			return p.d
		}},
	} {
		t.Run(c.reason, func(t *testing.T) {
			p := newParty(t, helping(), nil)
			pe, say, _ := p.holding("p")
			j, out := p.begin(pe)
			to := c.spoil(p, j, out, say)
			if err := p.Forward(t.Context(), j, out, to); err != nil || out.Name != "fallback-"+c.reason || decodeBody(j) != clientBody || out.Bound() {
				t.Errorf("%+v, %v; decode gets %s", out, err, decodeBody(j))
			}
			p.Leave(j, out, false)
			p.background.Wait()
			p.idle()
			p.want(1, "fallbacks_total", c.reason)
			p.want(0, "leaked_prefill_total")
			p.aborts("")

			p = newParty(t, waiting(), nil)
			pe, say, _ = p.holding("p")
			j, out = p.begin(pe)
			to = c.spoil(p, j, out, say)
			err := p.Forward(t.Context(), j, out, to)
			if e, ok := errors.AsType[*PhaseError](err); !ok || e.Reason != c.reason || e.Attempt != 1 || out.Name != "" {
				t.Errorf("%+v, %v", out, err)
			}
			p.Leave(j, out, false)
			p.background.Wait()
			p.idle()
			p.aborts("")
		})
	}
	p := newParty(t, helping(), nil) // a room that is full already is lost
	pe, say, _ := p.holding("p")
	j, out := p.begin(pe)
	say <- "200 {}"
	p.over(out)
	out.HandleUntil = time.Now().Add(-time.Second)
	_ = p.Forward(t.Context(), j, out, p.d)
	p.want(1, "leaked_prefill_total", "handle_expired")
}

// TestLegFailsUnderFail: onFailure fail holds to the last moment, for what another endpoint might have done better.
func TestLegFailsUnderFail(t *testing.T) {
	for _, c := range []struct {
		answer    string
		name      string // of the outcome
		fallbacks float64
	}{{"500 {}", "", 0}, {"400 {}", "fallback-rejected", 1}} {
		t.Run(c.answer, func(t *testing.T) {
			p := newParty(t, helping(), func(c *config.Disaggregation) { c.OnFailure = "fail" })
			pe, say, _ := p.holding("p")
			j, out := p.begin(pe)
			say <- c.answer
			<-out.Pending()
			err := p.Forward(t.Context(), j, out, p.d)
			if _, ok := errors.AsType[*PhaseError](err); ok != (c.name == "") || (err != nil) != ok || out.Name != c.name {
				t.Errorf("%+v, %v", out, err)
			}
			p.Leave(j, out, false)
			p.background.Wait()
			p.idle()
			if n := p.metric("fallbacks_total"); n != c.fallbacks {
				t.Errorf("%v fallbacks counted", n)
			}
		})
	}
}

// TestLegEndsWithTheBudget right before decode is sent: 504 as everywhere, where decode must not go on.
func TestLegEndsWithTheBudget(t *testing.T) {
	p := newParty(t, waiting(), func(c *config.Disaggregation) { c.Budget = time.Second })
	pe, _, _ := p.holding("p")
	j, out := p.begin(pe)
	<-out.Pending()
	if err := p.Forward(t.Context(), j, out, p.d); !errors.Is(err, ErrBudgetSpent) {
		t.Errorf("%+v, %v", out, err)
	}
	p.Leave(j, out, false)
	p.background.Wait()
	p.idle()
}

// TestPanicInALeg reaches the goroutine of the stream, which answers for it.
func TestPanicInALeg(t *testing.T) {
	p := newParty(t, waiting(), nil)
	pe, say, _ := p.holding("p")
	j, out := p.forward(pe)
	say <- "200 panic"
	p.over(out)
	func() {
		defer func() {
			if recover() == nil {
				t.Error("swallowed")
			}
		}()
		_ = p.Settle(t.Context(), j, out)
	}()
	p.Leave(j, out, false)
	p.idle()
}

// TestBodyOfALeg is dropped once it can no longer be sent anew.
func TestBodyOfALeg(t *testing.T) {
	r := newRig(t, nil)
	j := r.job(inference.Completions, clientBody, nil)
	body := newPassing(j.Request.Edit())
	if body.Len() != len(clientBody) {
		t.Errorf("%d bytes", body.Len())
	}
	buf := make([]byte, 1)
	if n, err := body.Reader().Read(buf); n != 1 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	body.edits.Store(nil)
	if _, err := body.Reader().Read(buf); !errors.Is(err, errReplayed) {
		t.Errorf("%v", err)
	}
}
