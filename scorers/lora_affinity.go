// SPDX-License-Identifier: Apache-2.0

package scorers

import (
	"slices"

	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/scheduler"
)

// loraAffinity is lora-affinity-scorer: the request's model is loaded as an adapter 1; else there is room for another
// adapter 0.8; else requests wait for it already 0.6; else 0. Unknown: 0, as for an engine without adapters (llm-d's
// too), so that adapters are not loaded where nobody can see them.
type loraAffinity struct{}

func newLoRAAffinity(_ *scheduler.Builder, raw config.Parameters) (any, error) {
	return loraAffinity{}, noParameters(raw)
}

// Score implements [scheduler.Scorer].
func (loraAffinity) Score(cy *scheduler.Cycle, cands []scheduler.Candidate, out []float64) {
	model := cy.Request.Model
	for i := range cands {
		out[i] = 0
		if !known(&cands[i], pool.HasLoRA, 0) {
			continue
		}
		m := cands[i].Metrics
		switch {
		case slices.Contains(m.RunningLoRA, model):
			out[i] = 1
		case len(m.RunningLoRA)+len(m.WaitingLoRA) < m.MaxLoRA:
			out[i] = 0.8
		case slices.Contains(m.WaitingLoRA, model):
			out[i] = 0.6
		}
	}
}
