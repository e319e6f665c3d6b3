// SPDX-License-Identifier: Apache-2.0

package director

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"testing"
	"time"

	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/scheduler"
	"github.com/baton-epp/baton/sidecar"
)

// TestStreamsEndIsPassedOn: what runs beside decode ends with the stream, unless the gateway ended it before the response.
func TestStreamsEndIsPassedOn(t *testing.T) {
	for end, want := range map[End]string{EndSeen: "[false]", EndUnseen: "[true]", EndUnanswered: "[false]"} {
		o := &scripted{}
		b := newBench(t, o)
		o.outcome = prefilled(b)
		x, _, err := b.run(t)
		if err != nil {
			t.Fatal(err)
		}
		x.Done(end)
		x.Done(end)
		if got := fmt.Sprint(o.left); got != want {
			t.Errorf("%d: told %s, want %s", end, got, want)
		}
	}
}

// TestSettledOutcome is what the response's header says, and what the records know.
func TestSettledOutcome(t *testing.T) {
	o := &scripted{settled: func(out *sidecar.Outcome) error { out.Name = "fallback-reset"; return nil }}
	b := newBench(t, o)
	o.outcome = prefilled(b)
	x, a, err := b.run(t)
	if err != nil {
		t.Fatal(err)
	}
	if err := x.Settle(t.Context()); err != nil || a.Outcome != "fallback-reset" {
		t.Errorf("%q, %v", a.Outcome, err)
	}
	failed := &sidecar.PhaseError{Phase: scheduler.PhasePrefill, Reason: "reset"}
	o.settled = func(out *sidecar.Outcome) error { out.Name = ""; return failed }
	if err := x.Settle(t.Context()); !errors.Is(err, failed) {
		t.Errorf("%v", err)
	}
	x.Done(EndUnanswered)
	if r := b.records[0]; r.Error == "" || r.Outcome != "" {
		t.Errorf("%+v", r)
	}
	if (*Exchange)(nil).Pending() != nil {
		t.Error("a stream without a request waits for something")
	}
}

// broken panics when the request is about to leave.
type broken struct{ *scripted }

func (broken) Forward(context.Context, *sidecar.Job, *sidecar.Outcome, *pool.Endpoint) error {
	panic("a connector's bug")
}

// TestPanicBeforeTheAnswer: the blocks of a prefill that was for nothing are given up, and the load is given back.
func TestPanicBeforeTheAnswer(t *testing.T) {
	o := &scripted{}
	b := newBench(t, o)
	b.d.opts.Orchestrator = broken{o}
	o.outcome = prefilled(b)
	before := loads(b.snapshot)
	var body inference.Body
	body.Append([]byte(`{"model":"m","prompt":"x"}`))
	x, err := b.d.Begin(&Incoming{Headers: inference.Headers{{Name: ":path", Value: "/v1/completions"}, {Name: ":method", Value: "POST"}}, Body: body, HasBody: true, Start: time.Now()})
	if err != nil {
		t.Fatal(err)
	}
	func() {
		defer func() { _ = recover() }()
		_, _ = x.Run(t.Context())
	}()
	x.Done(EndUnanswered)
	if fmt.Sprint(o.abandoned) != "[other]" || loads(b.snapshot) != before {
		t.Errorf("abandoned %v, loads %s, before %s", o.abandoned, loads(b.snapshot), before)
	}
}

// TestPrefillLoadIsTheOrchestrators: a prefill that outlives the stream goes on counting.
func TestPrefillLoadIsTheOrchestrators(t *testing.T) {
	o := &scripted{}
	b := newBench(t, o)
	o.outcome = prefilled(b)
	o.keepsLoad = true
	x, _, err := b.run(t)
	if err != nil {
		t.Fatal(err)
	}
	x.Done(EndUnseen)
	if n := b.snapshot.Endpoints[0].Load.Requests(); n != 1 {
		t.Errorf("%d on the prefill endpoint, want 1", n)
	}
}

// TestPaceIsLearned from the first event of streams: of a prompt that was fetched, and of one that was computed. Their
// head comes before anything was done.
func TestPaceIsLearned(t *testing.T) {
	for _, c := range []struct {
		name             string
		stream, handle   bool
		status           int
		events           bool // the gateway shows them
		api              inference.API
		computed, pulled bool
	}{
		{"streamed, aggregated", true, false, http.StatusOK, true, inference.Chat, true, false},
		{"streamed, with a handle", true, true, http.StatusOK, true, inference.Chat, false, true},
		{"the head only", true, false, http.StatusOK, false, inference.Chat, false, false},
		{"the head only, with a handle", true, true, http.StatusOK, false, inference.Chat, false, false},
		{"events before the first token", true, false, http.StatusOK, true, inference.Responses, false, false},
		{"not streamed", false, false, http.StatusOK, true, inference.Chat, false, false},
		{"an error", true, false, http.StatusBadRequest, true, inference.Chat, false, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := &scripted{}
			b := newBench(t, o)
			d := b.snapshot.Endpoints[1]
			for range 8 { // pace wants some samples before it says anything
				o.outcome = sidecar.Outcome{Name: "aggregated"}
				if c.handle {
					o.outcome = prefilled(b)
					o.outcome.PrefillTokens = 4096
				}
				x, _, err := b.run(t)
				if err != nil {
					t.Fatal(err)
				}
				x.req.Stream, x.req.API = c.stream, c.api
				for i := range x.decision.Phase(scheduler.PhaseDecode).Ranked {
					x.decision.Phase(scheduler.PhaseDecode).Ranked[i].UncachedTokens = 4096
				}
				x.ResponseHeaders(t.Context(), time.Now().Add(time.Millisecond), c.status, "", false)
				if c.events {
					x.BodyBegins(time.Now().Add(100 * time.Millisecond))
				}
				x.Done(EndSeen)
			}
			if got := d.Pace.TokensPerSecond() > 0; got != c.computed {
				t.Errorf("computed: %v tokens a second", d.Pace.TokensPerSecond())
			}
			if got := d.Pace.Transfer(4096) > 0; got != c.pulled {
				t.Errorf("fetched in %v", d.Pace.Transfer(4096))
			}
		})
	}
}
