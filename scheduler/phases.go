// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	"errors"
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

// Reasons why a phase does or does not run, besides the deciders'.
const (
	reasonNoProfile    = "no profile"
	reasonPrefillFirst = "prefill-first"
	reasonDecode       = "decode"
	reasonMustPrefill  = "decode endpoint cannot prefill"
	reasonNoEncoders   = "no encoder connector is configured (disaggregation.ecConnector)"
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
	if err := s.decode(d, q, peer); err != nil {
		return err
	}
	if decode := d.work.decode.Endpoint; q.OnlyDecode && q.needsPrefill(decode) {
		s.optional(d, q, PhasePrefill, ph.prefill, unconditional{}, decode)
	}
	return nil
}

// decode runs the one phase that must find an endpoint.
func (s *Scheduler) decode(d *Decision, q *Query, peer *pool.Endpoint) error {
	if err := s.phase(d, q, PhaseDecode, s.phases.decode, peer, nil); err != nil {
		return err
	}
	d.Picks[PhaseDecode].Reason = reasonDecode
	return nil
}

// optional runs encode or prefill where profile, decider and endpoints allow it; otherwise the request goes on with
// fewer phases and the pick says why.
func (s *Scheduler) optional(d *Decision, q *Query, ph Phase, p *profile, decider Decider, peer *pool.Endpoint) {
	pick := &d.Picks[ph]
	must := ph == PhasePrefill && p != nil && q.needsPrefill(peer)
	switch {
	case must:
		decider = mustPrefill{}
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
	case run && ph == PhaseEncode && !q.Encodes:
		reason = reasonNoEncoders
	case run:
		var pair PairDecider
		if ph == PhasePrefill && decode != nil {
			pair, _ = decider.(PairDecider)
		}
		switch err := s.phase(d, q, ph, p, peer, pair); {
		case err == nil && pair == nil:
		case err == nil, errors.Is(err, errDeclined):
			reason = pick.Reason
		default:
			reason = reasonNone(w.removed)
			// One that decodes and may prefill, too, does both: nothing is missing then.
			pick.Wanted = must || !slices.ContainsFunc(w.removed, func(r Removal) bool { return r.By == ByPeer })
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

// phase runs one profile and fills its pick, again as long as other requests take its choice away. Encode ranks all it
// finds and reserves nothing: items are spread over the endpoints, and each counts where it goes (package sidecar). pair,
// which may be nil, is asked about each choice before it is reserved; its no is errDeclined.
func (s *Scheduler) phase(d *Decision, q *Query, ph Phase, p *profile, peer *pool.Endpoint, pair PairDecider) error {
	w := d.work
	w.aim(ph, p, peer)
	tr := s.newTrace(d, p, ph)
	pick := &d.Picks[ph]
	want := max(q.Rank, 1)
	if ph == PhaseEncode {
		want = MaxEncoders
	}
	for try := 1; ; try++ {
		pick.Send = p.run(w, &s.phases, want, tr)
		if len(w.cands) == 0 {
			return &NoCandidateError{Profile: p.name, Removed: append([]Removal(nil), w.removed...)}
		}
		if w.declined(pair, pick) {
			return errDeclined
		}
		if !q.Reserve || ph == PhaseEncode {
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
	if q.Pulls && ph != PhaseEncode {
		pick.Source = w.source(&s.phases, &w.cands[0])
	}
	if ph != PhaseEncode {
		want = max(q.Rank, pick.Send)
	}
	for i := range w.cands[:min(want, len(w.cands))] {
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

// mustPrefill is the decider where the decode endpoint cannot do without ([Query.NeedsPrefill]).
type mustPrefill struct{}

func (mustPrefill) Decide(*Cycle, *Candidate) (bool, string) { return true, reasonMustPrefill }
