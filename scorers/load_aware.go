// SPDX-License-Identifier: Apache-2.0

package scorers

import (
	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/scheduler"
)

// loadAware is load-aware-scorer: 0.5 · (1 − min(q, T) / T), where q is the scraped queue depth and the requests sent
// since that scrape. Unknown: q is the requests in flight by our own count (llm-d: 0).
type loadAware struct {
	// Threshold is T, the queue depth from which on the score is 0; default 128, 0 and less = 128.
	Threshold int `yaml:"threshold"`
}

func newLoadAware(_ *scheduler.Builder, raw config.Parameters) (any, error) {
	s := &loadAware{Threshold: 128}
	err := raw.Decode(s)
	if s.Threshold <= 0 {
		s.Threshold = 128
	}
	return s, err
}

// Score implements [scheduler.Scorer].
func (s *loadAware) Score(_ *scheduler.Cycle, cands []scheduler.Candidate, out []float64) {
	limit := float64(s.Threshold)
	for i := range cands {
		out[i] = 0.5 * (1 - min(waiting(&cands[i]), limit)/limit)
	}
}
