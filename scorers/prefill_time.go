// SPDX-License-Identifier: Apache-2.0

package scorers

import (
	"slices"

	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/scheduler"
)

// prefillTimeNoise is the difference between two predictions that says nothing, in seconds: learned speeds vary by more than
// that between requests. Our own choice.
const prefillTimeNoise = 0.01

// prefillTime is prefill-time-scorer, Baton's own: (min + 10 ms) / (t + 10 ms), so that an endpoint that is twice as slow
// has half the score, and the slower of two that are nearly alike loses next to nothing. t is the predicted time of this
// request's prefill: the learned wait, or the tokens in flight by our own count at the learned speed if that is longer, and
// the uncached tokens at that speed (pool.Pace). Unknown: the mean of the speeds that are known, so that a new endpoint is
// neither shunned nor stormed; where none is known, tokens alone decide.
type prefillTime struct {
	// PrefixMatchInfoProducerName is the producer that tells the uncached tokens; empty = the default one.
	PrefixMatchInfoProducerName string `yaml:"prefixMatchInfoProducerName"`

	column int
}

func newPrefillTime(b *scheduler.Builder, raw config.Parameters) (any, error) {
	s := &prefillTime{}
	if err := raw.Decode(s); err != nil {
		return nil, err
	}
	column, err := b.Prefix(s.PrefixMatchInfoProducerName)
	if err != nil {
		return nil, raw.Errorf("prefixMatchInfoProducerName", "%v", err)
	}
	s.column = column
	return s, nil
}

// Score implements [scheduler.Scorer].
func (s *prefillTime) Score(cy *scheduler.Cycle, cands []scheduler.Candidate, out []float64) {
	if len(out) == 0 {
		return
	}
	sum, known := 0.0, 0
	for i := range cands { // read once: requests that end meanwhile teach new speeds
		out[i] = cands[i].Endpoint.Pace.TokensPerSecond()
		if out[i] > 0 {
			sum += out[i]
			known++
		}
	}
	mean := 1.0
	if known > 0 {
		mean = sum / float64(known)
	}
	for i := range cands {
		speed := out[i]
		if speed == 0 {
			speed = mean
		}
		out[i] = cands[i].PrefillSeconds(cy.Now, cy.Prompts[s.column].UncachedTokens(cands[i].Matched[s.column]), speed)
	}
	fastest := slices.Min(out)
	for i, t := range out {
		out[i] = (fastest + prefillTimeNoise) / (t + prefillTimeNoise)
	}
}
