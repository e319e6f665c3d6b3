// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"testing"

	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/sidecar/connectors"
)

// faulty is a wire whose connector panics at one moment.
type faulty struct {
	meeting
	decode, abort bool
}

func (f faulty) Decode(x *connectors.Exchange, handle []byte, body *inference.Edits) {
	if f.decode {
		panic("a connector's bug")
	}
	f.meeting.Decode(x, handle, body)
}

func (f faulty) Abort(x *connectors.Exchange) (path string, body []byte) {
	if f.abort {
		panic("a connector's bug")
	}
	return f.meeting.Abort(x)
}

// panics calls f, which must panic.
func panics(t *testing.T, f func()) {
	t.Helper()
	defer func() {
		if recover() == nil {
			t.Error("no panic")
		}
	}()
	f()
}

// TestPanicBesideALeg: nobody would be left to end the leg.
func TestPanicBesideALeg(t *testing.T) {
	p := newParty(t, waiting(), nil)
	p.settings.Load().wires[""] = wire{faulty{meeting: meeting{newRooms()}, decode: true}, waiting()}
	pe, _, _ := p.holding("p")
	panics(t, func() { _, _ = p.Run(t.Context(), p.job(inference.Completions, clientBody, p.d, pe)) })
	p.cancelled(t)
}

// TestPanicOfAnAbort ends neither the process nor the closing of a request's books.
func TestPanicOfAnAbort(t *testing.T) {
	for _, unseen := range []bool{false, true} {
		p := newParty(t, waiting(), nil)
		p.settings.Load().wires[""] = wire{faulty{meeting: meeting{newRooms()}, abort: true}, waiting()}
		pe, say, _ := p.holding("p")
		j, out := p.forward(pe)
		if unseen {
			p.Leave(j, out, true)
			say <- "500 {}"
			p.over(out)
		} else {
			p.Leave(j, out, false)
			p.cancelled(t)
		}
		p.want(1, "aborts_total", "failed")
	}
}

// forgetful is a wire whose question cannot be answered without a panic.
type forgetful struct{ asking }

func (forgetful) Enough(*connectors.Exchange, []byte) bool { panic("a connector's bug") }

func TestPanicOfAQuestion(t *testing.T) {
	r := newRig(t, nil)
	r.settings.Load().wires[""] = wire{forgetful{}, connectors.Traits{Name: "asking", Aggregates: true, APIs: []inference.API{inference.Completions}}}
	p, d := r.server("p", answer("{}")), r.server("d", answer(`{"enough"}`))
	panics(t, func() { _, _ = r.Run(t.Context(), r.job(inference.Completions, clientBody, d, p)) })
	r.idle()
}
