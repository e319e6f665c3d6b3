// SPDX-License-Identifier: Apache-2.0

package app

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/baton-epp/baton/internal/gatewaytest"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/simulate"
)

// row is a line of the failure matrix: what breaks, and what follows.
type row struct {
	name     string // the line of docs/design.md 3.5 or 5.2
	config   string // further settings of disaggregation
	sections string // further sections of the configuration
	engine   func(o *simulate.Options)
	timeout  string                // of one prefill attempt; default 10s
	leaky    bool                  // prefills are lost: their leases are short
	faults   []simulate.Fault      // of the prefill endpoints
	decode   []simulate.Fault      // of the decode endpoints
	applies  func(f *flavour) bool // nil = every wire
	spy      func(s *scenario)     // called when decode is scored for the spyAt-th time
	spyAt    int
	// run sends the request and checks; nil sends it once and compares with want.
	run  func(s *scenario)
	want func(f *flavour) want
}

// Expectations that many rows share.
var (
	disaggregated = want{status: 200, outcome: "disaggregated", reasons: []string{"ok"}}
)

// first makes a fault of the first attempt only.
func first(f simulate.Fault) []simulate.Fault {
	f.Phase, f.Attempt = "prefill", "1"
	return []simulate.Fault{f}
}

// always makes a fault of every prefill.
func always(f simulate.Fault) []simulate.Fault {
	f.Phase = "prefill"
	return []simulate.Fault{f}
}

// mended is what follows when the first attempt fails for a reason and the next one does not. With both legs at once the
// failure may show when decode was sent already.
func mended(reason string) func(f *flavour) want {
	return func(f *flavour) want {
		w := disaggregated
		w.reasons = []string{reason, "ok"}
		if f.atOnce() {
			w.or = []want{late(f, reason), unsent(f, reason)}
		}
		return w
	}
}

// late is a prefill that failed when decode was sent already.
func late(f *flavour, reason string) want {
	if f.EndsDecode {
		return want{status: 502, dropped: "prefill-failed", reasons: []string{reason}}
	}
	return want{status: 200, outcome: "fallback-" + reason, orOutcome: "disaggregated", reasons: []string{reason}}
}

// unsent is a prefill that failed after its request was on its way and right before decode's was: nobody else is asked, and
// decode goes on alone where it can.
func unsent(f *flavour, reason string) want {
	if !f.Aggregates || !f.EndsDecode {
		return late(f, reason)
	}
	return want{status: 200, outcome: "fallback-" + reason, reasons: []string{reason}}
}

// usedUp is what follows when no attempt succeeds; one is for failures after which no other prefiller is asked.
func usedUp(reason string, attempts int) func(f *flavour) want {
	return func(f *flavour) want {
		w := want{status: 200, outcome: "fallback-" + reason, reasons: slices.Repeat([]string{reason}, attempts)}
		if !f.Aggregates {
			w = want{status: 502, dropped: "prefill-failed", reasons: w.reasons}
		}
		if f.atOnce() {
			for n := 1; n <= attempts; n++ {
				for _, l := range []want{late(f, reason), unsent(f, reason)} {
					l.reasons = slices.Repeat([]string{reason}, n)
					w.or = append(w.or, l)
				}
			}
		}
		return w
	}
}

// failed is what follows when nobody may go on without prefill.
func failed(reason string, attempts int) func(f *flavour) want {
	return func(f *flavour) want {
		w := want{status: 502, dropped: "prefill-failed", reasons: slices.Repeat([]string{reason}, attempts)}
		if f.atOnce() {
			for n := 1; n <= attempts; n++ {
				l := late(f, reason)
				if l.reasons = slices.Repeat([]string{reason}, n); n < attempts { // right before decode was sent
					early := w
					early.reasons = l.reasons
					w.or = append(w.or, early)
				}
				w.or = append(w.or, l)
			}
		}
		return w
	}
}

// unmet adds what follows when both legs are at once and the decode leg never comes: the prefill is cancelled, unless it
// was over by then.
func unmet(f *flavour, w want) want {
	if !f.atOnce() {
		return w
	}
	cancelled := w
	// One that is over without decode, or was when it was cancelled, holds its blocks.
	w.expired = -2
	cancelled.reasons, cancelled.leaks, cancelled.expired = []string{"canceled"}, 0, -2
	w.or = append(w.or, cancelled)
	return w
}

func withHandle(f *flavour) bool { return f.Claims && !f.atOnce() && f.connector != "offloading" }
func serial(f *flavour) bool     { return !f.atOnce() }

func rows() []row {
	return []row{
		{name: "nothing fails", want: func(*flavour) want { return disaggregated }},
		{name: "prefill refused", sections: calm, run: oneRefuses},
		{name: "prefill reset", faults: first(simulate.Fault{Kind: "reset_before_headers"}), want: mended("reset")},
		{name: "prefill 500", faults: first(simulate.Fault{Kind: "status", Status: 500}), want: mended("status_5xx")},
		{name: "prefill 503", faults: first(simulate.Fault{Kind: "status", Status: 503}), want: mended("status_5xx")},
		{name: "prefill 404", faults: first(simulate.Fault{Kind: "status", Status: 404}), want: mended("not_found")},
		{name: "prefill 408", faults: first(simulate.Fault{Kind: "status", Status: 408}), want: mended("overloaded")},
		{name: "prefill 425", faults: first(simulate.Fault{Kind: "status", Status: 425}), want: mended("overloaded")},
		{name: "prefill 429", faults: first(simulate.Fault{Kind: "status", Status: 429, RetryAfter: "1"}), want: mended("overloaded")},
		{name: "prefill redirects", faults: first(simulate.Fault{Kind: "status", Status: 307}), want: mended("malformed")},
		{name: "prefill hangs", timeout: "1s", faults: first(simulate.Fault{Kind: "hang"}), want: mended("timeout")},
		{name: "prefill answers no JSON", faults: first(simulate.Fault{Kind: "status", Status: 200, Body: "<html>"}), want: mended("malformed")},
		{name: "prefill says error inside a 200", leaky: true, faults: first(simulate.Fault{Kind: "finish_error"}), want: func(f *flavour) want {
			w := mended("engine_error")(f)
			w.expired = -2 // what an engine in trouble keeps, nobody outside knows
			for i := range w.or {
				w.or[i].expired, w.or[i].served = -2, true
			}
			return w
		}},
		{
			name: "prefill 400", faults: always(simulate.Fault{Kind: "status", Status: 400}), want: usedUp("rejected", 1),
		},
		{
			name: "prefill 422", faults: always(simulate.Fault{Kind: "status", Status: 422}), want: usedUp("rejected", 1),
		},
		{name: "prefillers used up", faults: always(simulate.Fault{Kind: "status", Status: 500}), want: usedUp("status_5xx", 2)},
		{
			name: "prefillers used up, onFailure fail", config: "onFailure: fail",
			faults: always(simulate.Fault{Kind: "status", Status: 500}), want: failed("status_5xx", 2),
		},
		{
			name: "prefill without handle", leaky: true, applies: withHandle, faults: always(simulate.Fault{Kind: "no_handle"}),
			engine: func(o *simulate.Options) {
				if o.Connector == "lmcache-pd" { // written into a buffer of decode's, which fetches it in any case
					o.Lease = 20 * time.Second
				}
			},
			want: func(f *flavour) want {
				w := usedUp("handle_missing", 1)(f)
				w.expired = 1 // whether blocks are held is not known from an answer that names none
				if f.NeedsDecode {
					w.expired = 0 // they are with the decode endpoint already
				}
				return w
			},
		},
		{
			name: "decode gone during prefill", applies: serial, faults: always(simulate.Fault{Kind: "delay", DelayMS: 1500}), run: decodeGone,
			engine: func(o *simulate.Options) { o.Lease = 4 * time.Second }, // for another decode endpoint to come in time
		},
		{name: "no decode endpoint left after prefill", leaky: true, applies: serial, faults: always(simulate.Fault{Kind: "delay", DelayMS: 1500}), run: noDecodeLeft},
		{
			name: "budget spent", config: "budget: 300ms", faults: always(simulate.Fault{Kind: "hang"}),
			want: func(f *flavour) want {
				if f.atOnce() && !f.EndsDecode {
					return late(f, "budget")
				}
				return want{status: 504, dropped: "budget-spent", reasons: []string{"budget"}}
			},
		},
		{name: "client gone during prefill", leaky: true, faults: always(simulate.Fault{Kind: "delay", DelayMS: 5000}), run: clientGone},
		{
			name: "client gone before decode left", leaky: true, applies: repicked, config: "decodePick: after", spy: leaves, spyAt: 2,
			run: func(s *scenario) { clientGoneBetween(s, false) },
		},
		{
			name: "client gone before decode left, reclaimed", applies: func(f *flavour) bool { return repicked(f) && f.Claims && !f.atOnce() },
			config: "decodePick: after, reclaim: true", spy: leaves, spyAt: 2,
			engine: func(o *simulate.Options) { o.Lease = 5 * time.Second }, // time for the claim-and-drop request
			run:    func(s *scenario) { clientGoneBetween(s, true) },
		},
		{name: "panic in a plugin", spy: panics, spyAt: 1, want: refusal(500, "internal-error")},
		{
			name: "panic in a plugin after prefill", leaky: true, applies: repicked, config: "decodePick: after", spy: panics, spyAt: 2,
			want: func(f *flavour) want {
				w := want{status: 500, dropped: "internal-error", reasons: []string{"ok"}}
				if f.Claims {
					w.leaks, w.expired = 1, 1
				}
				return unmet(f, w)
			},
		},
		{
			name: "client gone during decode", run: clientGoneDecoding,
			engine: func(o *simulate.Options) { o.InterToken = time.Duration(float64(5*time.Second) / cmp.Or(o.Scale, 1)) },
		},
		{
			name: "decode 500 before it read the body", leaky: true, decode: []simulate.Fault{{Kind: "status", Status: 500}},
			want: func(f *flavour) want {
				w := want{status: 500, outcome: "disaggregated", reasons: []string{"ok"}}
				if f.Claims && !f.atOnce() {
					w.expired = 1 // an engine that fails of itself may have let go of the blocks: not counted as leaked
				}
				return unmet(f, w)
			},
		},
		{
			name: "decode 404", leaky: true, decode: []simulate.Fault{{Kind: "status", Status: 404}},
			want: func(f *flavour) want {
				w := want{status: 404, outcome: "disaggregated", reasons: []string{"ok"}}
				if f.Claims {
					w.leaks, w.expired = 1, 1
				}
				return unmet(f, w)
			},
		},
		{
			name: "decode not reached", leaky: true, sections: calm, run: unreached,
		},
		{name: "pool empty", run: nobody},
		{name: "no decode endpoint", run: noDecode},
		{name: "too many bytes held", applies: serial, sections: "limits: {maxBodyBytes: 400, maxHeldBytes: 400}\n", run: overBudget},
		{name: "body too large", sections: "limits: {maxBodyBytes: 200}\n", want: refusal(413, "body-too-large")},
		{name: "not JSON", run: notJSON},
		{name: "five failures eject", config: "breaker: {failures: 100}", run: ejected},
		{name: "the gateway sends twice", timeout: "2s", run: twice},
	}
}

func refusal(status int, reason string) func(*flavour) want {
	return func(*flavour) want { return want{status: status, dropped: reason} }
}

// oneRefuses: one of two prefill endpoints is down, and some request asks it first.
func oneRefuses(s *scenario) {
	s.engines("prefill")[0].Kill()
	for i := range 40 {
		s.id = fmt.Sprint("r", i)
		w := disaggregated
		if n := len(s.reasonsAfter()); n == 2 {
			w.reasons = []string{"refused", "ok"}
			s.check(s.last, nil, w)
			return
		}
		s.check(s.last, nil, w)
	}
	s.t.Error("no request met the endpoint that refuses")
}

// decodeGone: the endpoint picked for decode stops answering while prefill runs.
func decodeGone(s *scenario) {
	done := s.start(s.t.Context())
	picked := s.busy("decode")
	s.writeEndpoints(slices.DeleteFunc(slices.Clone(s.pool.Engines()), func(e *simulate.Engine) bool { return e.Addr() == picked.Addr })...)
	r := <-done
	w := disaggregated
	if s.flavour.NeedsDecode { // prefilled for that endpoint only
		w = want{status: 200, outcome: "fallback-decode_changed", reasons: []string{"ok"}}
		if s.flavour.Claims {
			w.leaks, w.expired = 1, 1
		}
	}
	s.check(r.reply, r.err, w)
	if r.reply.Destination == picked.Hostport {
		s.t.Error("the request went to the endpoint that is gone")
	}
}

// prefills are the prefills that endpoints with faults were asked for, all but the questions that some wires begin with.
func (s *scenario) prefills() (all []simulate.Recorded) {
	for _, e := range s.engines("prefill") {
		if len(e.Faults().Rules) == 0 {
			continue
		}
		for _, b := range e.Bodies() {
			if b.Phase == "prefill" {
				all = append(all, b)
			}
		}
	}
	return all
}

// twice: a gateway that retries, which none of the shipped configurations does, delivers what can be used once a second
// time. Where blocks are still known, and where decode needs none, that is harmless; other engines fail the second
// request or let it wait for their own timer.
func twice(s *scenario) {
	g, err := gatewaytest.New(gatewaytest.Options{Picker: s.app.Addr().String(), Request: s.mode, Resend: true})
	if err != nil {
		s.t.Fatal(err)
	}
	defer func() { _ = g.Close() }()
	ctx, cancel := context.WithTimeout(s.t.Context(), 2*time.Second)
	defer cancel()
	r, err := g.Do(ctx, s.path, []byte(s.body), "x-request-id", s.id)
	switch {
	case errors.Is(err, context.DeadlineExceeded):
	case err != nil:
		s.t.Errorf("the second delivery: %v", err)
	case r.Status == 200 && len(r.Body) > 0 && !strings.Contains(string(r.Body), `"error"`):
		if text := answerText(s.t, r.Body); text != s.want {
			s.t.Errorf("the second delivery gave another text: %q", text)
		}
	case r.Status != 200 && r.Status != 500:
		s.t.Errorf("the second delivery: status %d", r.Status)
	}
	if harmless := s.flavour.name == "nixlv2" || s.flavour.name == "moriio" || s.flavour.blind(); harmless && (err != nil || r.Status != 200) {
		s.t.Errorf("the second delivery: %+v, %v", r, err)
	}
	s.leftWith(want{})
}

// noDecodeLeft: every decode endpoint leaves the pool while prefill runs.
func noDecodeLeft(s *scenario) {
	done := s.start(s.t.Context())
	s.busy("decode")
	s.writeEndpoints(s.engines("prefill")...)
	r := <-done
	w := want{status: 503, dropped: "rejected-no-endpoints", reasons: []string{"ok"}}
	if s.flavour.Claims {
		w.leaks, w.expired = 1, 1
	}
	s.check(r.reply, r.err, w)
}

// busy waits for an endpoint of a role with a request counted on it.
func (s *scenario) busy(role string) (found *pool.Endpoint) {
	s.t.Helper()
	eventually(s.t, "a request at a "+role+" endpoint", func() bool {
		for _, e := range s.app.Snapshot().Endpoints {
			if e.Labels[pool.LabelRole] == role && e.Load.Requests() > 0 {
				found = e
			}
		}
		return found != nil
	})
	return found
}

type outcome struct {
	reply *gatewaytest.Reply
	err   error
}

// start sends the request without waiting.
func (s *scenario) start(ctx context.Context) <-chan outcome {
	done := make(chan outcome, 1)
	go func() {
		r, err := s.do(ctx)
		done <- outcome{r, err}
	}()
	return done
}

// reasonsAfter sends the request and returns how its attempts ended.
func (s *scenario) reasonsAfter() []string {
	s.t.Helper()
	r, err := s.do(s.t.Context())
	if err != nil {
		s.t.Fatal(err)
	}
	s.last = r
	return s.reasons()
}

func clientGone(s *scenario) {
	ctx, leave := context.WithCancel(s.t.Context())
	defer leave()
	done := s.start(ctx)
	eventually(s.t, "a prefill runs", func() bool { return len(s.prefills()) > 0 }) // no introduction before it
	leave()
	if r := <-done; !errors.Is(r.err, context.Canceled) {
		s.t.Errorf("reply %+v, error %v", r.reply, r.err)
	}
	w := want{}
	if s.flavour.connector == "offloading" {
		w.expired = -2 // blocks that were computed when the client left are parked all the same
	}
	s.leftWith(w)
	if n := len(s.prefills()); n != 1 {
		s.t.Errorf("%d prefills, want the one that was cancelled", n)
	}
}

// repicked: with decodePick: after, decode is chosen anew once prefill is over or under way.
func repicked(f *flavour) bool { return !f.NeedsDecode }

func panics(*scenario) { panic("a plugin's bug") }

// leaves ends the client while decode is chosen after prefill, and lets the picker have time to hear of it.
func leaves(s *scenario) {
	s.leave()
	<-s.left
	<-time.After(300 * time.Millisecond)
}

// clientGoneBetween: prefill is over, and nobody waits for decode any more. When the picker hears of the end of a stream is
// the machine's affair; what it hears of too late it can neither count nor reclaim, and the request is made again.
func clientGoneBetween(s *scenario, reclaim bool) {
	var w want
	for tries := 1; ; tries++ {
		var ctx context.Context
		ctx, s.leave = context.WithCancel(s.t.Context())
		s.left = make(chan struct{})
		s.calls.Store(0)
		r, err := s.do(ctx)
		close(s.left)
		if !errors.Is(err, context.Canceled) {
			s.t.Errorf("reply %+v, error %v", r, err)
		}
		eventually(s.t, "no stream left", func() bool { return s.app.server.Streams() == 0 })
		w.leaks = int(s.sum("baton_sidecar_leaked_prefill_total"))
		reclaimed := int(s.sum("baton_sidecar_reclaims_total"))
		if s.flavour.atOnce() {
			if w.expired = -2; w.leaks == 1 { // it was over; else it is cancelled
				w.expired = 1
			}
			break
		}
		if s.flavour.Claims {
			w.expired = tries - reclaimed
		}
		if !s.flavour.Claims || w.leaks > 0 && (!reclaim || reclaimed > 0) {
			break
		}
		if tries == 5 {
			s.t.Errorf("%d leaks counted and %d reclaimed in %d tries", w.leaks, reclaimed, tries)
			break
		}
	}
	for _, e := range s.engines("decode") {
		if n := len(e.Bodies()); !reclaim && n > 0 {
			s.t.Errorf("%d requests at %s", n, e.Name())
		}
	}
	s.leftWith(w)
}

func clientGoneDecoding(s *scenario) {
	ctx, leave := context.WithCancel(s.t.Context())
	defer leave()
	done := s.start(ctx)
	eventually(s.t, "decode runs", func() bool {
		for _, e := range s.engines("decode") {
			for _, h := range e.Held() {
				if h.State == "decode" {
					return true
				}
			}
		}
		return false
	})
	leave()
	if r := <-done; !errors.Is(r.err, context.Canceled) {
		s.t.Errorf("reply %+v, error %v", r.reply, r.err)
	}
	s.leftWith(want{})
}

// unreached: nothing listens at the decode endpoints any more.
func unreached(s *scenario) {
	for _, e := range s.engines("decode") {
		e.Kill()
	}
	w := want{status: 503, outcome: "disaggregated", reasons: []string{"ok"}}
	if s.flavour.Claims {
		w.leaks, w.expired = 1, 1
	}
	w = unmet(s.flavour, w)
	if s.flavour.NeedsDecode { // the engine needs its receiver; which one may be left has no meaning here
		w = want{status: 503, outcome: "fallback-status_5xx", reasons: []string{"status_5xx", "status_5xx"}}
	}
	r, err := s.do(s.t.Context())
	s.check(r, err, w)
}

func nobody(s *scenario) {
	s.writeEndpoints()
	eventually(s.t, "an empty pool", func() bool { return len(s.app.Snapshot().Endpoints) == 0 })
	r, err := s.do(s.t.Context())
	s.check(r, err, want{status: 503, dropped: "rejected-no-endpoints"})
}

func noDecode(s *scenario) {
	s.writeEndpoints(s.engines("prefill")...)
	eventually(s.t, "prefill alone", func() bool { return len(s.app.Snapshot().Endpoints) == 2 })
	r, err := s.do(s.t.Context())
	s.check(r, err, want{status: 503, dropped: "rejected-no-endpoints"})
}

// overBudget: one request holds all the bytes there are when another one comes.
func overBudget(s *scenario) {
	short := chatBody(20, `,"temperature":0`)
	s.body, s.want = short, reference(s.t, s.path, short)
	s.setFaults("prefill", always(simulate.Fault{Kind: "delay", DelayMS: 3000})...)
	done := s.start(s.t.Context())
	eventually(s.t, "the first is held", func() bool { return s.sum("baton_admission_held_bytes") > 0 })
	body := []byte(chatBody(60, ""))
	r, err := s.gateway.Do(s.t.Context(), s.path, body, "x-request-id", "second")
	if err != nil || r.Status != 429 || r.Header.Get("retry-after") == "" {
		s.t.Errorf("reply %+v, error %v", r, err)
	}
	o := <-done
	s.check(o.reply, o.err, disaggregated)
}

func notJSON(s *scenario) {
	s.body = `{"model":"tiny","messages":`
	r, err := s.do(s.t.Context())
	s.check(r, err, want{status: 400, dropped: "malformed-body"})
}

// ejected: an endpoint that failed five times in a row is left alone until its ejection is over, and then asked once.
func ejected(s *scenario) {
	s.path = "/v1/completions"
	sick := s.engines("prefill")[0]
	if err := sick.SetFaults(simulate.Faults{Rules: []simulate.Fault{{Phase: "prefill", Kind: "status", Status: 500}}}); err != nil {
		s.t.Fatal(err)
	}
	start := time.Now()
	for i := range 40 {
		s.id, s.body = fmt.Sprint("r", i), fmt.Sprintf(`{"model":"tiny","max_tokens":2,"prompt":"%d %s"}`, i*1000003, strings.Repeat("x ", 40))
		if _, err := s.do(s.t.Context()); err != nil {
			s.t.Fatal(err)
		}
	}
	over := 0 // ejections that have ended meanwhile: none, unless the machine is very slow
	for at := pool.EjectFor; at < time.Since(start); at += pool.EjectFor << over {
		over++
	}
	asked, ejections := len(s.prefills()), int(s.metric("baton_director_ejections_total"))
	if asked < pool.EjectAfter || asked > pool.EjectAfter+over || ejections != 1+asked-pool.EjectAfter {
		s.t.Errorf("asked %d times and ejected %d times while %d ejections ended; want %d failures, and one probe after each", asked, ejections, over, pool.EjectAfter)
	}
	s.leftWith(want{})
}
