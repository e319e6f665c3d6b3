// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	"sync/atomic"

	"github.com/baton-epp/baton/pool"
)

// claimCells is how many claim counters there are; endpoints whose slots share one only cost each other a retry.
const claimCells = 4096

// maxTries bounds how often a choice is made again because another request took the same endpoint meanwhile. Each
// failed try means that somebody else succeeded, so the pool as a whole never waits.
const maxTries = 64

// yieldAfter is the number of tries after which whoever holds the claim is given the processor: it may have lost its
// own between the two steps of a reservation.
const yieldAfter = 8

// claims makes "choose and reserve" one step without a lock: every counter is even at rest and odd while a reservation
// is being counted. A choice reads the counter before the endpoint's load and may reserve only if it has not moved
// since. Other endpoints may have become busier meanwhile, which only confirms the choice.
type claims [claimCells]atomic.Uint32

func (c *claims) cell(e *pool.Endpoint) *atomic.Uint32 { return &c[e.Slot%claimCells] }

func (c *claims) read(e *pool.Endpoint) uint32 { return c.cell(e).Load() }

// take begins a reservation; false when the endpoint's load may have changed since seen was read.
func (c *claims) take(e *pool.Endpoint, seen uint32) bool {
	return seen%2 == 0 && c.cell(e).CompareAndSwap(seen, seen+1)
}

// done ends what take began.
func (c *claims) done(e *pool.Endpoint) { c.cell(e).Add(1) }

// settle makes the first of w.cands the choice: it counts the request on it and claims the probe of an endpoint on
// probation. ok false: the choice has to be made again. last: take it whatever happened meanwhile.
func (s *Scheduler) settle(w *work, last bool, tokens int64) (r *pool.Reservation, ok bool) {
	first := &w.cands[0]
	e := first.Endpoint
	claimed := s.claims.take(e, first.claim)
	if !claimed && !last {
		return nil, false
	}
	probed := first.standing == pool.Probation && !e.Health.TryProbe(w.cycle.Now) && len(w.cands) > 1 && !last
	if !probed {
		r = e.Load.Reserve(tokens)
	}
	if claimed {
		s.claims.done(e)
	}
	if probed {
		s.withdraw(w, first.index)
	}
	return r, !probed
}

// withdraw takes row i out of the race: another request probes that endpoint.
func (s *Scheduler) withdraw(w *work, i int32) {
	s.drop(w, w.rows[i].Endpoint, ByHealth, reasonProbed)
	w.rows = append(w.rows[:i], w.rows[i+1:]...)
}

// reload reads the loads of all rows anew.
func (s *Scheduler) reload(w *work) {
	for i := range w.rows {
		s.readLoad(&w.rows[i])
	}
}
