// SPDX-License-Identifier: Apache-2.0

package scorers

import (
	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/scheduler"
)

// activeRequest is active-request-scorer: with n requests in flight by our own count, 1 up to idleThreshold, else
// (max − n) / max · maxBusyScore over the candidates. Nothing scraped is needed, so nothing is ever unknown.
type activeRequest struct {
	// IdleThreshold is how many requests an endpoint may have and still count as idle; default 0.
	IdleThreshold int64 `yaml:"idleThreshold"`
	// MaxBusyScore is the best score of an endpoint that is not idle, 0–1; default 1.
	MaxBusyScore float64 `yaml:"maxBusyScore"`
	// InFlightLoadProducerName is accepted: every producer shows the same counts.
	InFlightLoadProducerName string `yaml:"inFlightLoadProducerName"`
	// RequestTimeout is deprecated and ignored.
	RequestTimeout string `yaml:"requestTimeout"`
}

func newActiveRequest(_ *scheduler.Builder, raw config.Parameters) (any, error) {
	s := &activeRequest{MaxBusyScore: 1}
	if err := raw.Decode(s); err != nil {
		return nil, err
	}
	switch {
	case s.IdleThreshold < 0:
		return nil, raw.Errorf("idleThreshold", "%d, must be ≥ 0", s.IdleThreshold)
	case s.MaxBusyScore < 0 || s.MaxBusyScore > 1:
		return nil, raw.Errorf("maxBusyScore", "%v, must be between 0 and 1", s.MaxBusyScore)
	}
	return s, nil
}

// Score implements [scheduler.Scorer].
func (s *activeRequest) Score(_ *scheduler.Cycle, cands []scheduler.Candidate, out []float64) {
	most := int64(1)
	for i := range cands {
		most = max(most, cands[i].Requests)
	}
	for i := range cands {
		n := cands[i].Requests
		out[i] = 1
		if n > s.IdleThreshold {
			out[i] = float64(most-n) / float64(most) * s.MaxBusyScore
		}
	}
}
