// SPDX-License-Identifier: Apache-2.0

package extproc

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/baton-epp/baton/director"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/sidecar"
)

// scripted stands for the orchestrator where a test needs it to misbehave, which the real one does not.
type scripted struct {
	run func(ctx context.Context, j *sidecar.Job) (*sidecar.Outcome, error)
}

var _ director.Orchestrator = (*scripted)(nil)

func (s *scripted) Mode() string { return "orchestrate" }
func (s *scripted) Rank() int    { return 3 }

// DecodeAfter is decodePick: before.
func (s *scripted) DecodeAfter() bool { return false }

func (s *scripted) Run(ctx context.Context, j *sidecar.Job) (*sidecar.Outcome, error) {
	return s.run(ctx, j)
}

func (s *scripted) Forward(context.Context, *sidecar.Job, *sidecar.Outcome, *pool.Endpoint) error {
	return nil
}
func (s *scripted) Transferred(context.Context, *sidecar.Outcome, *pool.Endpoint, bool) {}
func (s *scripted) Abandon(context.Context, *sidecar.Job, *sidecar.Outcome, string)     {}
func (s *scripted) NeedsPrefill(*pool.Endpoint) bool                                    { return false }

func (s *scripted) Encodes() bool { return false }

func (s *scripted) Pulls() bool { return false }

func (s *scripted) EndsDecode(*sidecar.Outcome) bool { return false }

func (s *scripted) Settle(context.Context, *sidecar.Job, *sidecar.Outcome) error { return nil }
func (s *scripted) Leave(*sidecar.Job, *sidecar.Outcome, bool)                   {}

func TestPanicIsAnswered500(t *testing.T) {
	k := newKit(t, kitOptions{snapshot: three(), orchestrat: &scripted{run: func(context.Context, *sidecar.Job) (*sidecar.Outcome, error) {
		panic("a plugin's bug")
	}}})
	call := k.open()
	call.send(first{}.message(t))
	call.send(bodyMessage([]byte(chat), true))
	if im := call.refused(); im.GetStatus().GetCode() != 500 {
		t.Errorf("status %v", im.GetStatus().GetCode())
	}
	eventually(t, "closed", func() bool { return k.server.Streams() == 0 })
	if inFlight(k.snapshot) != 0 || k.gate.Held() != 0 || testutil.ToFloat64(k.server.metrics.panics) != 1 {
		t.Errorf("%d in flight, %d bytes held, %v panics", inFlight(k.snapshot), k.gate.Held(), testutil.ToFloat64(k.server.metrics.panics))
	}
}

func TestErrorsOfTheHeldPhase(t *testing.T) {
	for _, c := range []struct {
		name string
		err  error
		code int32
	}{
		{"budget", sidecar.ErrBudgetSpent, 504},
		{"prefill", &sidecar.PhaseError{}, 502},
		{"not carried", fmt.Errorf("%w: n > 1", sidecar.ErrNotCarried), 400},
		{"unknown", errors.New("x"), 500},
	} {
		t.Run(c.name, func(t *testing.T) {
			k := newKit(t, kitOptions{snapshot: three(), orchestrat: &scripted{run: func(context.Context, *sidecar.Job) (*sidecar.Outcome, error) { return nil, c.err }}})
			call := k.open()
			call.send(first{}.message(t))
			call.send(bodyMessage([]byte(chat), true))
			if im := call.refused(); int32(im.GetStatus().GetCode()) != c.code {
				t.Errorf("status %v, want %d", im.GetStatus().GetCode(), c.code)
			}
			eventually(t, "released", func() bool { return inFlight(k.snapshot) == 0 })
		})
	}
}

func TestClientGoneDuringTheHeldPhase(t *testing.T) {
	entered, left := make(chan struct{}), make(chan error, 1)
	k := newKit(t, kitOptions{snapshot: three(), orchestrat: &scripted{run: func(ctx context.Context, _ *sidecar.Job) (*sidecar.Outcome, error) {
		close(entered)
		<-ctx.Done()
		left <- ctx.Err()
		return nil, ctx.Err()
	}}})
	call := k.open()
	call.send(first{}.message(t))
	call.send(bodyMessage([]byte(chat), true))
	<-entered
	call.cancel()
	select {
	case err := <-left:
		if !errors.Is(err, context.Canceled) {
			t.Errorf("cancelled with %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("the held phase was not cancelled")
	}
	eventually(t, "closed", func() bool { return k.server.Streams() == 0 })
	if inFlight(k.snapshot) != 0 {
		t.Error("load not released")
	}
}
