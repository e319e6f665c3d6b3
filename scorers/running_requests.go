// SPDX-License-Identifier: Apache-2.0

package scorers

import (
	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/scheduler"
)

// runningRequests is running-requests-size-scorer: (max − x) / (max − min) over the candidates, all equal 1, where x is
// the scraped number of running requests and the requests sent since that scrape. Unknown: the requests in flight by
// our own count (llm-d: 0).
type runningRequests struct{}

func newRunningRequests(_ *scheduler.Builder, raw config.Parameters) (any, error) {
	return runningRequests{}, noParameters(raw)
}

// Score implements [scheduler.Scorer].
func (runningRequests) Score(_ *scheduler.Cycle, cands []scheduler.Candidate, out []float64) {
	for i := range cands {
		out[i] = running(&cands[i])
	}
	spread(out)
}
