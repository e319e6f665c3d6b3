// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/scheduler"
	"github.com/baton-epp/baton/sidecar/connectors"
)

// Pulls reports whether endpoints may fetch cached prefixes from each other (disaggregation.pullCachedPrefix).
func (o *Orchestrator) Pulls() bool {
	s := o.settings.Load()
	if !s.PullCachedPrefix || s.Mode == modeOff || s.Mode == modeHeaders {
		return false
	}
	for _, w := range s.wires {
		if _, ok := w.Connector.(connectors.Puller); ok {
			return true
		}
	}
	return false
}

// source is the third endpoint from which e, which is to compute the prompt in that phase, may fetch the cached part of
// it; nil when there is none.
func (r *run) source(phase scheduler.Phase, e *pool.Endpoint) *pool.Endpoint {
	source := r.j.Decision.Phase(phase).Source
	if source == nil || e == nil || !r.s.PullCachedPrefix || keyOf(source) == keyOf(e) || !keyOf(source).alive(r.o.snapshot()) ||
		!r.s.sameWire(source.Engine, &r.wire) {
		return nil
	}
	if _, ok := r.wire.Connector.(connectors.Puller); !ok {
		return nil
	}
	return source
}

// pull lets decode, which computes the prompt itself, fetch the cached part of it from a third endpoint.
func (r *run) pull() {
	puller, ok := r.wire.Connector.(connectors.Puller)
	if !ok || !r.carries() || r.delegates() || r.s.Mode == modeOff {
		return
	}
	source := r.source(scheduler.PhaseDecode, r.j.Decode)
	if source == nil {
		return
	}
	x := r.exchange(nil)
	x.Source = source
	puller.Pull(x, r.j.Body)
	r.out.x, r.out.wire = x, r.wire
}

// unpull takes back what pull did where decode is another endpoint now.
func (o *Orchestrator) unpull(s *settings, j *Job, out *Outcome, decode *pool.Endpoint) {
	if out.x == nil || out.x.Prefiller != nil || out.x.Source == nil {
		return
	}
	if keyOf(out.x.Source) == keyOf(decode) || !s.sameWire(decode.Engine, &out.wire) {
		out.wire.Withdraw(out.x, j.Body)
		out.x = nil
	}
}
