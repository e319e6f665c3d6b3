// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"time"

	"github.com/baton-epp/baton/pool"
)

// Why an endpoint that was ranked is not asked.
const (
	skipGone     = "left the pool"
	skipRole     = "is no prefill endpoint any more"
	skipWire     = "speaks another wire"
	skipNotReady = "is not ready"
	skipEjected  = "is ejected"
	skipBreaker  = "has its circuit breaker open, or the decode endpoint's with it"
	skipTaken    = "is on probation, which another request uses"
)

// usable returns the endpoint as the snapshot has it now, or why it must not be asked: it left the pool, changed its
// role, speaks another wire, or is known to be sick. The first choice is the scheduler's, which has weighed its health.
// It takes no permit of breakers and no probe: admit does, when nothing else can stand in the way any more.
func (r *run) usable(ranked *pool.Endpoint, first bool, now time.Time) (e *pool.Endpoint, skip string) {
	e = r.o.snapshot().ByAddr(ranked.Addr)
	switch {
	case e == nil || e.UID != ranked.UID:
		return nil, skipGone
	case e.Role != 0 && !e.Role.Has(pool.RolePrefill):
		return nil, skipRole
	case r.out.way == wayOrchestrate && !r.s.sameWire(e.Engine, &r.wire):
		return nil, skipWire
	}
	switch e.Health.Standing(now) {
	case pool.NotReady:
		return nil, skipNotReady
	case pool.Ejected:
		if !first {
			return nil, skipEjected
		}
	case pool.Probation, pool.Healthy:
	}
	if !r.o.peers.ready(e, r.j.Decode, now) {
		return nil, skipBreaker
	}
	return e, ""
}

// candidate is usable for a walk, which remembers why the first one was skipped.
func (r *run) candidate(ranked *pool.Endpoint, first bool, now time.Time) *pool.Endpoint {
	e, skip := r.usable(ranked, first, now)
	r.skip(ranked, skip)
	return e
}

func (r *run) skip(e *pool.Endpoint, why string) {
	if why != "" && r.skipped == nil {
		r.skipped, r.skippedWhy = e, why
	}
}

// admit takes the permits that e's breakers and its probation demand, right before it is asked; false when another
// request took one since usable looked.
func (r *run) admit(e *pool.Endpoint, first bool, now time.Time) bool {
	if !r.o.peers.allow(e, r.j.Decode, now) {
		r.skip(e, skipBreaker)
		return false
	}
	if !first && e.Health.Standing(now) == pool.Probation && !e.Health.TryProbe(now) {
		r.skip(e, skipTaken)
		return false
	}
	return true
}

// explain says why none of those ranked could be tried.
func (r *run) explain(reason string) {
	if reason == reasonNoPrefiller && r.skipped != nil {
		r.out.WayReason = "none could be tried: " + r.skipped.Hostport + " " + r.skippedWhy
	}
}
