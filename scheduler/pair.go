// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	"cmp"
	"errors"

	"github.com/baton-epp/baton/pool"
)

// PairDecider is an optional interface of a prefill [Decider] that compares the decode endpoint with the very endpoint
// that would prefill. It is asked after Decide said yes and the prefill profile has chosen, before anything is reserved:
// a no leaves no trace in the load counts. reason is a constant. It may not wait, fail, allocate or log.
type PairDecider interface {
	DecidePair(cy *Cycle, decode, prefill *Candidate) (run bool, reason string)
}

// errDeclined is a phase that a [PairDecider] has declined; the reason stands in its pick.
var errDeclined = errors.New("declined by the decider")

// declined asks pair about the choice of the profile that just ran. pair may be nil.
func (w *work) declined(pair PairDecider, pick *Pick) bool {
	if pair == nil {
		return false
	}
	run, reason := pair.DecidePair(&w.cycle, &w.decode, &w.cands[0])
	pick.Reason = reason
	if !run {
		pick.Send = 0
	}
	return !run
}

// needsPrefill reports whether decode cannot serve a prompt that was not prefilled elsewhere.
func (q *Query) needsPrefill(decode *pool.Endpoint) bool {
	return q.NeedsPrefill != nil && decode != nil && q.NeedsPrefill(decode)
}

// Pairs reports whether a prefill at one endpoint can serve a decode at the other: they are not the same one, they agree
// on every label of disaggregation.pairLabels, they run the same engine, and the prefill's tensor parallel size, where
// both tell theirs, is not the larger one.
func (s *Scheduler) Pairs(prefill, decode *pool.Endpoint) bool {
	return apart(prefill, decode) && s.phases.fits(prefill, decode)
}

// fits is Pairs for two endpoints that may be the same.
func (p *phases) fits(from, to *pool.Endpoint) bool {
	return p.labelsAgree(from, to) && sameEngine(from, to) && !splitFiner(from, to)
}

// apart reports whether a and b are two endpoints, in whatever snapshots they are.
func apart(a, b *pool.Endpoint) bool { return a.State != b.State }

// labelsAgree reports whether two endpoints agree on every pair label; one that both lack agrees.
func (p *phases) labelsAgree(a, b *pool.Endpoint) bool {
	for _, label := range p.pairLabels {
		if a.Labels[label] != b.Labels[label] {
			return false
		}
	}
	return true
}

// sameEngine: no engine reads another one's KV blocks.
func sameEngine(a, b *pool.Endpoint) bool {
	return a.Engine == b.Engine || cmp.Or(a.Engine, pool.DefaultEngine) == cmp.Or(b.Engine, pool.DefaultEngine)
}

// splitFiner reports whether from splits its KV blocks over more GPUs than to, as far as both tell: vLLM's decode process
// ends on such blocks.
func splitFiner(from, to *pool.Endpoint) bool {
	return to.TensorParallel > 0 && from.TensorParallel > to.TensorParallel
}

// cutPairs removes the candidates that cannot hand over to the endpoint of the other phase, or take over from it.
func (w *work) cutPairs(ph *phases, tr *ProfileTrace) {
	peer, prefills := w.cycle.Peer, w.cycle.Phase == PhasePrefill
	if len(ph.pairLabels) > 0 {
		w.cut(keep(w.cands, func(c *Candidate) bool { return ph.labelsAgree(c.Endpoint, peer) }), ByPair, reasonPair, tr)
	}
	w.cut(keep(w.cands, func(c *Candidate) bool { return sameEngine(c.Endpoint, peer) }), ByPair, reasonEngine, tr)
	if peer.TensorParallel > 0 {
		w.cut(keep(w.cands, func(c *Candidate) bool {
			if prefills {
				return !splitFiner(c.Endpoint, peer)
			}
			return !splitFiner(peer, c.Endpoint)
		}), ByPair, reasonTensor, tr)
	}
}

// source is the endpoint, the picked one and those not healthy aside, that holds the longest part of the prompt of the
// default producer, if that is longer than what picked holds by at least MinSourceTokens and picked can take its blocks
// over. Of equal ones the request's seed takes one.
func (w *work) source(ph *phases, picked *Candidate) *pool.Endpoint {
	prompt := &w.cycle.Prompts[0]
	missing := prompt.UncachedTokens(picked.Matched[0])
	var best *Candidate
	var bestTie uint64
	for i := range w.rows {
		c := &w.rows[i]
		if c.Matched[0] <= picked.Matched[0] || best != nil && c.Matched[0] < best.Matched[0] {
			continue
		}
		// A row that was let stay because half the pool is ejected has no standing to show it.
		if c.standing != pool.Healthy || !c.Endpoint.Health.EjectedUntil().IsZero() ||
			missing-prompt.UncachedTokens(c.Matched[0]) < MinSourceTokens ||
			!apart(c.Endpoint, picked.Endpoint) || !ph.fits(c.Endpoint, picked.Endpoint) {
			continue
		}
		if tie := w.cycle.Tie(c.Endpoint); best == nil || c.Matched[0] > best.Matched[0] || tie > bestTie {
			best, bestTie = c, tie
		}
	}
	if best == nil {
		return nil
	}
	return best.Endpoint
}
