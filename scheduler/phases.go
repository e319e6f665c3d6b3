// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	"runtime"
	"slices"

	"github.com/baton-epp/baton/pool"
)

// phases is what a profile handler comes to: which profile runs for which phase, in which order, and who decides.
// Immutable.
type phases struct {
	name, kind                    string   // of the handler's plugin
	decode, encode, prefill       *profile // encode and prefill nil = never
	encodeDecider, prefillDecider Decider
	prefillFirst                  bool
	guardRoles                    bool // no configuration: see ByRole
	pairLabels                    []string
}

// profile returns the profile of a phase, nil when there is none.
func (p *phases) profile(ph Phase) *profile {
	switch ph {
	case PhaseEncode:
		return p.encode
	case PhasePrefill:
		return p.prefill
	default:
		return p.decode
	}
}

// Pairs reports whether a prefill at one endpoint can serve a decode at the other: they are not the same one, and they
// agree on every label of disaggregation.pairLabels.
func (s *Scheduler) Pairs(prefill, decode *pool.Endpoint) bool {
	return apart(prefill, decode) && s.phases.labelsAgree(prefill, decode)
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

// Reasons why a phase does or does not run, besides the deciders'.
const (
	reasonNoProfile    = "no profile"
	reasonPrefillFirst = "prefill-first"
	reasonDecode       = "decode"
	reasonNoEncoders   = "encoders are not built yet"
)

// all runs the phases in the handler's order.
func (s *Scheduler) all(d *Decision, q *Query) error {
	ph := &s.phases
	if !ph.prefillFirst {
		if err := s.decode(d, q, nil); err != nil {
			return err
		}
		peer := d.work.decode.Endpoint
		s.optional(d, q, PhaseEncode, ph.encode, ph.encodeDecider, peer)
		s.optional(d, q, PhasePrefill, ph.prefill, ph.prefillDecider, peer)
		return nil
	}
	s.optional(d, q, PhasePrefill, ph.prefill, unconditional{}, nil)
	var peer *pool.Endpoint
	if p := &d.Picks[PhasePrefill]; p.Run {
		peer = p.Ranked[0].Endpoint
	}
	s.optional(d, q, PhaseEncode, ph.encode, ph.encodeDecider, peer)
	return s.decode(d, q, peer)
}

// decode runs the one phase that must find an endpoint.
func (s *Scheduler) decode(d *Decision, q *Query, peer *pool.Endpoint) error {
	if err := s.phase(d, q, PhaseDecode, s.phases.decode, peer); err != nil {
		return err
	}
	d.Picks[PhaseDecode].Reason = reasonDecode
	return nil
}

// optional runs encode or prefill where profile, decider and endpoints allow it; otherwise the request goes on with
// fewer phases and the pick says why.
func (s *Scheduler) optional(d *Decision, q *Query, ph Phase, p *profile, decider Decider, peer *pool.Endpoint) {
	pick := &d.Picks[ph]
	switch {
	case p == nil || decider == nil:
		pick.Reason = reasonNoProfile
		return
	case q.OnlyDecode:
		pick.Reason = q.OnlyReason
		return
	}
	w := d.work
	w.aim(ph, p, peer)
	var decode *Candidate
	if w.decode.Endpoint != nil {
		decode = &w.decode
	}
	run, reason := decider.Decide(&w.cycle, decode)
	switch {
	case run && ph == PhaseEncode:
		reason = reasonNoEncoders // package sidecar has no encoder connector: load would be reserved for nothing
	case run:
		if err := s.phase(d, q, ph, p, peer); err != nil {
			reason = reasonNone(w.removed)
			// One that decodes and may prefill, too, does both: nothing is missing then.
			pick.Wanted = !slices.ContainsFunc(w.removed, func(r Removal) bool { return r.By == ByPeer })
		}
	}
	pick.Reason = reason
}

// reasonNone is the reason of the filter that removed most, for a phase that found no endpoint.
func reasonNone(removed []Removal) string {
	reason, most := "empty pool", 0
	for _, r := range removed {
		if r.Count > most {
			reason, most = r.Reason, r.Count
		}
	}
	return reason
}

// aim points the cycle at a phase.
func (w *work) aim(ph Phase, p *profile, peer *pool.Endpoint) {
	w.cycle.Phase, w.cycle.Profile, w.cycle.Peer = ph, p.name, peer
	w.cycle.Seed = mix(w.seed + uint64(ph))
}

// phase runs one profile and fills its pick, again as long as other requests take its choice away.
func (s *Scheduler) phase(d *Decision, q *Query, ph Phase, p *profile, peer *pool.Endpoint) error {
	w := d.work
	w.aim(ph, p, peer)
	tr := s.newTrace(d, p, ph)
	pick := &d.Picks[ph]
	for try := 1; ; try++ {
		pick.Send = p.run(w, &s.phases, max(q.Rank, 1), tr)
		if len(w.cands) == 0 {
			return &NoCandidateError{Profile: p.name, Removed: append([]Removal(nil), w.removed...)}
		}
		if !q.Reserve {
			break
		}
		var ok bool
		if pick.Reservation, ok = s.settle(w, try >= maxTries, s.reserveTokens(w, ph, &w.cands[0])); ok {
			break
		}
		s.metrics.retries.Inc()
		if try > yieldAfter {
			runtime.Gosched()
		}
		s.reload(w)
	}
	if ph == PhaseDecode {
		w.decode = w.cands[0]
	}
	pick.Run = true
	for i := range w.cands[:min(max(q.Rank, pick.Send), len(w.cands))] {
		c := &w.cands[i]
		pick.Ranked = append(pick.Ranked, Ranked{
			Endpoint:       c.Endpoint,
			Score:          c.Score,
			Matched:        c.Matched[0],
			UncachedTokens: w.cycle.Prompts[0].UncachedTokens(c.Matched[0]),
			ReserveTokens:  s.reserveTokens(w, ph, c),
		})
	}
	return nil
}

// reserveTokens is what a reservation on c counts.
func (s *Scheduler) reserveTokens(w *work, ph Phase, c *Candidate) int64 {
	tokens := w.cycle.Prompts[s.inflight.column].UncachedTokens(c.Matched[s.inflight.column])
	if ph == PhaseDecode {
		tokens += s.inflight.outputTokens(w.cycle.Request)
	}
	return tokens
}

// unconditional is the decider of a prefill-first prefill.
type unconditional struct{}

func (unconditional) Decide(*Cycle, *Candidate) (bool, string) { return true, reasonPrefillFirst }
