// SPDX-License-Identifier: Apache-2.0

package pickers

import (
	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/scheduler"
)

// random is random-picker: every order is equally likely, scores do not matter.
type random struct{ parameters }

func newRandom(_ *scheduler.Builder, raw config.Parameters) (any, error) {
	p, err := decode(raw)
	return &random{p}, err
}

// Pick implements [scheduler.Picker].
func (p *random) Pick(cy *scheduler.Cycle, cands []scheduler.Candidate, want int) int {
	ordered, send := p.depth(len(cands), want)
	for rank := range ordered {
		swap(cy, cands, rank)
	}
	return send
}

// swap puts a random one of the candidates from rank on into rank.
func swap(cy *scheduler.Cycle, cands []scheduler.Candidate, rank int) {
	i := rank + int(cy.Unit()*float64(len(cands)-rank))
	cands[rank], cands[i] = cands[i], cands[rank]
}
