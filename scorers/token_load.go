// SPDX-License-Identifier: Apache-2.0

package scorers

import (
	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/scheduler"
)

// tokenLoad is token-load-scorer: 1 − min(t, T) / T, where t is the tokens in flight by our own count and this
// request's uncached tokens. Nothing scraped is needed, so nothing is ever unknown.
type tokenLoad struct {
	// QueueThresholdTokens is T, the tokens from which on the score is 0; default 4194304, 0 and less = default.
	QueueThresholdTokens int64 `yaml:"queueThresholdTokens"`
	// InFlightLoadProducerName is accepted: every producer shows the same counts.
	InFlightLoadProducerName string `yaml:"inFlightLoadProducerName"`
}

const defaultThresholdTokens = 4 << 20

func newTokenLoad(_ *scheduler.Builder, raw config.Parameters) (any, error) {
	s := &tokenLoad{QueueThresholdTokens: defaultThresholdTokens}
	err := raw.Decode(s)
	if s.QueueThresholdTokens <= 0 {
		s.QueueThresholdTokens = defaultThresholdTokens
	}
	return s, err
}

// Score implements [scheduler.Scorer]. Uncached tokens are those of the default prefix producer.
func (s *tokenLoad) Score(cy *scheduler.Cycle, cands []scheduler.Candidate, out []float64) {
	limit := s.QueueThresholdTokens
	for i := range cands {
		t := max(0, cands[i].Tokens) + cy.Prompts[0].UncachedTokens(cands[i].Matched[0])
		out[i] = 1 - float64(min(t, limit))/float64(limit)
	}
}
