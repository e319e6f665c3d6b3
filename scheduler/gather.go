// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	"net/netip"
	"slices"
	"time"

	"github.com/baton-epp/baton/pool"
)

// Reasons of [BySubset] and [ByHealth].
const (
	reasonSubset   = "not in the gateway's subset"
	reasonNotReady = "not ready"
	reasonEjected  = "ejected after failures"
	reasonSleeping = "asleep"
	reasonProbed   = "being probed by another request"
)

// work is the memory of one cycle, pooled with its Decision.
type work struct {
	cycle    Cycle
	seed     uint64
	rows     []Candidate // one per endpoint that may be picked at all
	cands    []Candidate // of the profile that runs, compacted and ordered
	out      []float64   // the scores of one scorer
	memories [MaxProducers]Memory
	pooled   []Removal // by subset and health
	removed  []Removal // pooled and by the profile that ran last
	dropped  []RowTrace
	subset   []netip.AddrPort // sorted, for long hints
	roles    bool             // a role label is in the snapshot
	ramping  bool             // an endpoint is younger than pool.RampUp
	decode   Candidate        // the endpoint picked for decode, for the deciders
	timed    bool             // this cycle's plugins are timed
}

// gather fills rows from the snapshot: one pass, one look at each atomic.
func (s *Scheduler) gather(w *work, q *Query) {
	w.rows, w.pooled, w.dropped = w.rows[:0], w.pooled[:0], w.dropped[:0]
	w.roles, w.ramping = false, false
	w.prepareSubset(q.Subset.Addrs)
	if q.Snapshot == nil {
		return
	}
	ejected := 0
	for _, e := range q.Snapshot.Endpoints {
		w.roles = w.roles || e.Role != 0
		if q.Subset.Given && !w.inSubset(q.Subset.Addrs, e.Addr) {
			s.drop(w, e, BySubset, reasonSubset)
			continue
		}
		standing := e.Health.Standing(q.Now)
		m := e.Metrics()
		fresh := m.Fresh(q.Now)
		switch {
		case standing == pool.NotReady:
			s.drop(w, e, ByHealth, reasonNotReady)
			continue
		case fresh && m.Sleeping:
			s.drop(w, e, ByHealth, reasonSleeping)
			continue
		case standing == pool.Ejected:
			ejected++
		}
		w.ramping = w.ramping || q.Now.Sub(e.Born) < pool.RampUp
		w.rows = append(w.rows, Candidate{Endpoint: e, Metrics: m, Fresh: fresh, standing: standing})
		s.readLoad(&w.rows[len(w.rows)-1])
	}
	if ejected > 0 {
		s.eject(w)
	}
	if cap(w.out) < len(w.rows) {
		w.out = make([]float64, len(w.rows)+len(w.rows)/4)
	}
}

// readLoad reads the endpoint's own counts; the claim counter first, so that a change after it is noticed.
func (s *Scheduler) readLoad(c *Candidate) {
	c.claim = s.claims.read(c.Endpoint)
	c.Requests = c.Endpoint.Load.Requests()
	c.Tokens = c.Endpoint.Load.Tokens()
	c.SinceScrape = c.Endpoint.Load.SinceScrape(c.Metrics)
}

// drop notes an endpoint that cannot be picked whatever the profile.
func (s *Scheduler) drop(w *work, e *pool.Endpoint, by, reason string) {
	w.pooled = addRemoval(w.pooled, by, reason, 1)
	if s.trace {
		w.dropped = append(w.dropped, RowTrace{Endpoint: e, RemovedBy: by, Reason: reason})
	}
}

func addRemoval(list []Removal, by, reason string, n int) []Removal {
	if n == 0 {
		return list
	}
	for i := range list {
		if list[i].By == by && list[i].Reason == reason {
			list[i].Count += n
			return list
		}
	}
	return append(list, Removal{By: by, Reason: reason, Count: n})
}

// longSubset is from where on a hint is sorted and searched instead of scanned.
const longSubset = 16

func (w *work) prepareSubset(addrs []netip.AddrPort) {
	w.subset = w.subset[:0]
	if len(addrs) > longSubset {
		w.subset = append(w.subset, addrs...)
		slices.SortFunc(w.subset, netip.AddrPort.Compare)
	}
}

func (w *work) inSubset(addrs []netip.AddrPort, a netip.AddrPort) bool {
	if len(addrs) <= longSubset {
		return slices.Contains(addrs, a)
	}
	_, found := slices.BinarySearchFunc(w.subset, a, netip.AddrPort.Compare)
	return found
}

// eject removes ejected endpoints, but at most half of those that share a role: with more gone than that, failures
// say more about the requests or the network than about the endpoints. Those whose ejection ends first stay.
func (s *Scheduler) eject(w *work) {
	var all, out [256]int // by role
	for i := range w.rows {
		role := w.rows[i].Endpoint.Role
		all[role]++
		if w.rows[i].standing == pool.Ejected {
			out[role]++
		}
	}
	for role := range out {
		for out[role] > all[role]/2 {
			w.reprieve(pool.Role(role))
			out[role]--
		}
	}
	kept := w.rows[:0]
	for i := range w.rows {
		if w.rows[i].standing == pool.Ejected {
			s.drop(w, w.rows[i].Endpoint, ByHealth, reasonEjected)
			continue
		}
		kept = append(kept, w.rows[i])
	}
	w.rows = kept
}

// reprieve lets the endpoint of role stay whose ejection ends first.
func (w *work) reprieve(role pool.Role) {
	var first *Candidate
	var until time.Time
	for i := range w.rows {
		c := &w.rows[i]
		if c.standing != pool.Ejected || c.Endpoint.Role != role {
			continue
		}
		if t := c.Endpoint.Health.EjectedUntil(); first == nil || t.Before(until) {
			first, until = c, t
		}
	}
	if first != nil {
		first.standing = pool.Healthy // no probe needed: there is nobody better
	}
}

// rampSlack is added to ages: an endpoint gets a small share from the first moment on, and pools whose endpoints were
// all found within a second are not thinned.
const rampSlack = time.Second

// rampUp is the last filter: a new endpoint stays in the race for a share of the requests that grows with its age,
// relative to the oldest endpoint left, so that a pool of new endpoints only is not thinned at all.
func (w *work) rampUp(cands []Candidate) int {
	age := func(c *Candidate) time.Duration {
		return max(0, min(w.cycle.Now.Sub(c.Endpoint.Born), pool.RampUp)) + rampSlack
	}
	var oldest time.Duration
	for i := range cands {
		oldest = max(oldest, age(&cands[i]))
	}
	kept := 0
	for i := range cands {
		share := float64(age(&cands[i])) / float64(oldest)
		// One number per request and endpoint, in every phase the same.
		if share < 1 && unit(mix(w.cycle.Tie(cands[i].Endpoint))) >= share {
			continue
		}
		cands[kept], cands[i] = cands[i], cands[kept]
		kept++
	}
	return kept
}
