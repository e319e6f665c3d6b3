// SPDX-License-Identifier: Apache-2.0

package pickers

import (
	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/scheduler"
)

// maxScore is max-score-picker: highest score first, equal ones in an order that is random per request and repeatable.
type maxScore struct{ parameters }

func newMaxScore(_ *scheduler.Builder, raw config.Parameters) (any, error) {
	p, err := decode(raw)
	return &maxScore{p}, err
}

// Pick implements [scheduler.Picker]: one pass over the candidates per rank, since few ranks are wanted.
func (p *maxScore) Pick(cy *scheduler.Cycle, cands []scheduler.Candidate, want int) int {
	ordered, send := p.depth(len(cands), want)
	for rank := range ordered {
		best, tie := rank, uint64(0)
		tied := false // tie is best's
		for i := rank + 1; i < len(cands); i++ {
			switch {
			case cands[i].Score > cands[best].Score:
				best, tied = i, false
			case cands[i].Score == cands[best].Score: // exact, since equal facts give equal sums
				if !tied {
					tie, tied = cy.Tie(cands[best].Endpoint), true
				}
				if t := cy.Tie(cands[i].Endpoint); t > tie {
					best, tie = i, t
				}
			}
		}
		cands[rank], cands[best] = cands[best], cands[rank]
	}
	return send
}
