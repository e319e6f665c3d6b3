// SPDX-License-Identifier: Apache-2.0

package scorers

import (
	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/scheduler"
)

// warmPair is warm-pair-scorer, Baton's own: 1 for an endpoint that has exchanged KV blocks with the one picked for the
// other phase, so that the transfer needs no handshake; else 0. While no other phase is picked, and for encode: 0.5.
type warmPair struct{}

func newWarmPair(_ *scheduler.Builder, raw config.Parameters) (any, error) {
	return warmPair{}, noParameters(raw)
}

// Score implements [scheduler.Scorer]. It is the decode endpoint that remembers, see pool.Warm.
func (warmPair) Score(cy *scheduler.Cycle, cands []scheduler.Candidate, out []float64) {
	peer := cy.Peer
	for i := range cands {
		out[i] = 0
		switch {
		case peer == nil || cy.Phase == scheduler.PhaseEncode:
			out[i] = 0.5
		case cy.Phase == scheduler.PhasePrefill && peer.Warm.Has(cands[i].Endpoint.Slot),
			cy.Phase == scheduler.PhaseDecode && cands[i].Endpoint.Warm.Has(peer.Slot):
			out[i] = 1
		}
	}
}
