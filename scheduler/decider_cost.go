// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	"time"

	"github.com/baton-epp/baton/config"
)

// Reasons of the cost decider besides the deciders' own.
const (
	reasonApart    = "prefill apart is faster"
	reasonLocal    = "the decode endpoint prefills faster"
	reasonUntaught = "speeds not learned yet"
	reasonExplored = "the other way, to keep both learned"
)

// exploreSalt keeps the choice of who explores apart from the seed's other uses.
const exploreSalt = 0x6c62272e07bb0142

// costDecider is cost-pd-decider, Baton's own: prefill runs apart when that is expected to be sooner than a prefill at
// the decode endpoint, by what earlier requests have shown (pool.Pace): wait and computing at the prefill endpoint, with
// its own prefix matches, and the transfer, against wait and computing at the decode endpoint.
type costDecider struct {
	// MinTokens is the smallest part of the prompt, in tokens not cached on the decode endpoint, that may run apart;
	// default 256.
	MinTokens int `yaml:"minTokens"`
	// Advantage is how many times longer than apart the prefill at the decode endpoint has to take; default 1. Above 1
	// spares the prefill endpoints, below 1 the decode endpoints.
	Advantage float64 `yaml:"advantage"`
	// Unknown is what happens while the speed of one of the two endpoints is not learned: disaggregate (default) or
	// aggregate.
	Unknown string `yaml:"unknown"`
	// ExploreOneIn lets one request in so many take the other way, so that both stay learned; default 32, 0 = none.
	ExploreOneIn int `yaml:"exploreOneIn"`
	// Handshake is added to the transfer of a pair's first request. Default 0: it is paid once per pair, and a pair that
	// always has to pay it in the comparison stays cold.
	Handshake time.Duration `yaml:"handshake"`

	column int
}

func newCostDecider(b *Builder, raw config.Parameters) (any, error) {
	d := &costDecider{MinTokens: 256, Advantage: 1, Unknown: "disaggregate", ExploreOneIn: 32}
	if err := raw.Decode(d); err != nil {
		return nil, err
	}
	if err := notNegative(raw, map[string]int{"minTokens": d.MinTokens, "exploreOneIn": d.ExploreOneIn}); err != nil {
		return nil, err
	}
	switch {
	case d.Advantage <= 0:
		return nil, raw.Errorf("advantage", "%v, must be > 0", d.Advantage)
	case d.Unknown != "disaggregate" && d.Unknown != "aggregate":
		return nil, raw.Errorf("unknown", "%q, must be disaggregate or aggregate", d.Unknown)
	case d.ExploreOneIn == 1:
		return nil, raw.Errorf("exploreOneIn", "1 would send every request the slower way; must be 0 or ≥ 2")
	case d.Handshake < 0:
		return nil, raw.Errorf("handshake", "%v, must be ≥ 0", d.Handshake)
	}
	column, err := b.Prefix("")
	d.column = column
	return d, err
}

// Decide implements [Decider]: what can be said before the prefill endpoint is known.
func (d *costDecider) Decide(cy *Cycle, decode *Candidate) (run bool, reason string) {
	prompt := &cy.Prompts[d.column]
	switch {
	case prompt.Tokens < d.MinTokens:
		return false, reasonShort
	case decode != nil && prompt.UncachedTokens(decode.Matched[d.column]) < int64(d.MinTokens):
		return false, reasonCached
	}
	return true, reasonUncached
}

// DecidePair implements [PairDecider].
func (d *costDecider) DecidePair(cy *Cycle, decode, prefill *Candidate) (run bool, reason string) {
	local, apart := decode.Endpoint.Pace.TokensPerSecond(), prefill.Endpoint.Pace.TokensPerSecond()
	switch {
	case local == 0 || apart == 0:
		run, reason = d.Unknown == "disaggregate", reasonUntaught
	case d.localSeconds(cy, decode, local) > d.Advantage*d.apartSeconds(cy, decode, prefill, apart):
		run, reason = true, reasonApart
	default:
		run, reason = false, reasonLocal
	}
	if d.ExploreOneIn > 0 && mix(cy.Seed^exploreSalt)%uint64(d.ExploreOneIn) == 0 {
		return !run, reasonExplored
	}
	return run, reason
}

func (d *costDecider) localSeconds(cy *Cycle, decode *Candidate, speed float64) float64 {
	return decode.PrefillSeconds(cy.Now, cy.Prompts[d.column].UncachedTokens(decode.Matched[d.column]), speed)
}

// apartSeconds ends, as the local prefill does, with the first token of the decode endpoint, which fetches the blocks it
// does not hold itself.
func (d *costDecider) apartSeconds(cy *Cycle, decode, prefill *Candidate, speed float64) float64 {
	prompt := &cy.Prompts[d.column]
	move := decode.Endpoint.Pace.Transfer(prompt.UncachedTokens(decode.Matched[d.column]))
	if !decode.Endpoint.Warm.Has(prefill.Endpoint.Slot) {
		move += d.Handshake
	}
	return prefill.PrefillSeconds(cy.Now, prompt.UncachedTokens(prefill.Matched[d.column]), speed) + move.Seconds()
}
