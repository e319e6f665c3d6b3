// SPDX-License-Identifier: Apache-2.0

package pickers

import (
	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/scheduler"
)

// weightedRandom is weighted-random-picker: each rank is drawn from those left with chances in proportion to their
// scores. That is the distribution of A-Res (Efraimidis and Spirakis), which llm-d uses, without a logarithm per
// candidate. Scores of 0 come last, in random order.
type weightedRandom struct{ parameters }

func newWeightedRandom(_ *scheduler.Builder, raw config.Parameters) (any, error) {
	p, err := decode(raw)
	return &weightedRandom{p}, err
}

// Pick implements [scheduler.Picker].
func (p *weightedRandom) Pick(cy *scheduler.Cycle, cands []scheduler.Candidate, want int) int {
	ordered, send := p.depth(len(cands), want)
	for rank := range ordered {
		left := cands[rank:]
		total := 0.0
		for i := range left {
			total += max(0, left[i].Score)
		}
		if total == 0 {
			swap(cy, cands, rank)
			continue
		}
		drawn := draw(left, cy.Unit()*total)
		left[0], left[drawn] = left[drawn], left[0]
	}
	return send
}

// draw returns the candidate in whose part of the summed scores at lies.
func draw(left []scheduler.Candidate, at float64) int {
	last := 0
	for i := range left {
		if left[i].Score <= 0 {
			continue
		}
		last = i
		if at -= left[i].Score; at < 0 {
			break
		}
	}
	return last // the sum may round to a little less than total
}
