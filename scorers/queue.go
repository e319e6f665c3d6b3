// SPDX-License-Identifier: Apache-2.0

package scorers

import (
	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/scheduler"
)

// queue is queue-scorer: (max − x) / (max − min) over the candidates, all equal 1, where x is the scraped queue depth
// and the requests sent since that scrape. Unknown: the requests in flight by our own count (llm-d: 0).
type queue struct{}

func newQueue(_ *scheduler.Builder, raw config.Parameters) (any, error) {
	return queue{}, noParameters(raw)
}

// Score implements [scheduler.Scorer].
func (queue) Score(_ *scheduler.Cycle, cands []scheduler.Candidate, out []float64) {
	for i := range cands {
		out[i] = waiting(&cands[i])
	}
	spread(out)
}
