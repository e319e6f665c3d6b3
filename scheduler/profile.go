// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/baton-epp/baton/pool"
)

// profile is filters, weighted scorers and a picker under one name. Immutable.
type profile struct {
	name    string
	filters []profileFilter
	scorers []profileScorer
	picker  profilePicker
}

type profileFilter struct {
	Filter
	name  string
	timer prometheus.Observer
}

type profileScorer struct {
	Scorer
	name   string
	weight float64
	timer  prometheus.Observer
	bad    prometheus.Counter // scores outside 0–1
}

type profilePicker struct {
	Picker
	name  string
	timer prometheus.Observer
}

// run leaves the ranked candidates, best first at least as far as want, in w.cands and returns how many may be named
// to the gateway. No candidates left is no error here. tr is nil unless decisions are traced.
func (p *profile) run(w *work, ph *phases, want int, tr *ProfileTrace) (send int) {
	cy := &w.cycle
	cy.rand = 0
	w.removed = append(w.removed[:0], w.pooled...)
	w.cands = append(w.cands[:0], w.rows...)
	for i := range w.cands {
		w.cands[i].index = int32(i)
	}
	tr.begin(p, w)
	for i := range p.filters {
		f := &p.filters[i]
		start := w.start()
		kept, reason := f.Filter.Filter(cy, w.cands)
		w.stop(start, f.timer)
		w.cut(kept, f.name, reason, tr)
	}
	w.cutBuiltIn(ph, tr)
	if len(w.cands) == 0 {
		return 0
	}
	p.score(w, tr)
	start := w.start()
	send = p.picker.Pick(cy, w.cands, want)
	w.stop(start, p.picker.timer)
	send = max(1, min(send, len(w.cands)))
	tr.rank(w.cands, max(want, send))
	return send
}

// score adds up the weighted scores. A score that is not a number from 0 to 1 is a plugin's mistake: it counts as 0
// and is counted.
func (p *profile) score(w *work, tr *ProfileTrace) {
	out := w.out[:len(w.cands)]
	for i := range p.scorers {
		sc := &p.scorers[i]
		start := w.start()
		sc.Score(&w.cycle, w.cands, out)
		w.stop(start, sc.timer)
		for j, v := range out {
			if !(v >= 0 && v <= 1) { // also true for NaN
				sc.bad.Inc()
				v = 0
			}
			w.cands[j].Score += sc.weight * v
			tr.score(i, &w.cands[j], v)
		}
	}
}

// cut keeps the first candidates and notes who removed the others.
func (w *work) cut(kept int, by, reason string, tr *ProfileTrace) {
	if kept == len(w.cands) {
		return
	}
	w.removed = addRemoval(w.removed, by, reason, len(w.cands)-kept)
	tr.remove(w.cands[kept:], by, reason)
	w.cands = w.cands[:kept]
}

// Reasons of the built-in filters.
const (
	reasonRole   = "the role label does not allow decode"
	reasonPeer   = "it decodes this request"
	reasonPair   = "its labels differ from the other phase's endpoint"
	reasonEngine = "its engine differs from the other phase's endpoint"
	reasonTensor = "prefill's tensor parallel size is larger than decode's"
	reasonRampUp = "new"
)

// cutBuiltIn applies what no profile names: the role guard of the default profile, a prefill apart from the endpoint
// that decodes and able to hand over to it, the ramp-up of new endpoints.
func (w *work) cutBuiltIn(ph *phases, tr *ProfileTrace) {
	if ph.guardRoles && w.roles {
		w.cut(keep(w.cands, func(c *Candidate) bool {
			return c.Endpoint.Role == 0 || c.Endpoint.Role.Has(pool.RoleDecode)
		}), ByRole, reasonRole, tr)
	}
	if peer := w.cycle.Peer; peer != nil && w.cycle.Phase == PhasePrefill {
		w.cut(keep(w.cands, func(c *Candidate) bool { return apart(c.Endpoint, peer) }), ByPeer, reasonPeer, tr)
	}
	if w.cycle.Peer != nil && w.cycle.Phase != PhaseEncode {
		w.cutPairs(ph, tr)
	}
	if w.ramping && len(w.cands) > 1 {
		w.cut(w.rampUp(w.cands), ByRampUp, reasonRampUp, tr)
	}
}

// keep moves the candidates that ok accepts to the front, in order, and returns how many they are.
func keep(cands []Candidate, ok func(c *Candidate) bool) int {
	kept := 0
	for i := range cands {
		if ok(&cands[i]) {
			if i != kept {
				cands[kept], cands[i] = cands[i], cands[kept]
			}
			kept++
		}
	}
	return kept
}

// start and stop time a plugin in the one cycle of ten that is timed.
func (w *work) start() time.Time {
	if !w.timed {
		return time.Time{}
	}
	return time.Now()
}

func (w *work) stop(start time.Time, o prometheus.Observer) {
	if w.timed {
		o.Observe(time.Since(start).Seconds())
	}
}
