// SPDX-License-Identifier: Apache-2.0

package scorers

import (
	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/scheduler"
)

// prefixCache is prefix-cache-scorer: w · min(1, matched · blockSize / scale)² + (1 − w) · matched / total, over the
// leading blocks of the prompt that the endpoint is believed to hold. Unknown (no prompt, nothing learned): 0.
type prefixCache struct {
	weight float64 // w
	scale  float64 // tokens
	column int
}

// prefixCacheParameters are the scorer's, and those of files older than the producer, which configured the index here.
type prefixCacheParameters struct {
	// PrefixMatchInfoProducerName is the producer to read; empty = the default one, made if the file has none.
	PrefixMatchInfoProducerName string `yaml:"prefixMatchInfoProducerName"`
	// MatchLengthWeight is w, 0–1; default 0.
	MatchLengthWeight float64 `yaml:"matchLengthWeight"`
	// MatchLengthScaleTokens is scale, the matched tokens that are worth the full w; default 8192.
	MatchLengthScaleTokens int `yaml:"matchLengthScaleTokens"`

	AutoTune               *bool `yaml:"autoTune"`
	BlockSize              *int  `yaml:"blockSize"`              // tokens
	HashBlockSize          *int  `yaml:"hashBlockSize"`          // bytes, four to a token
	MaxPrefixBlocksToMatch *int  `yaml:"maxPrefixBlocksToMatch"` // of that size
	LRUCapacityPerServer   *int  `yaml:"lruCapacityPerServer"`   // blocks
}

func newPrefixCache(b *scheduler.Builder, raw config.Parameters) (any, error) {
	p := prefixCacheParameters{MatchLengthScaleTokens: 8192}
	if err := raw.Decode(&p); err != nil {
		return nil, err
	}
	switch {
	case p.MatchLengthWeight < 0 || p.MatchLengthWeight > 1:
		return nil, raw.Errorf("matchLengthWeight", "%v, must be between 0 and 1", p.MatchLengthWeight)
	case p.MatchLengthScaleTokens <= 0:
		return nil, raw.Errorf("matchLengthScaleTokens", "%d, must be > 0", p.MatchLengthScaleTokens)
	}
	index, err := p.index(raw)
	if err != nil {
		return nil, err
	}
	s := &prefixCache{weight: p.MatchLengthWeight, scale: float64(p.MatchLengthScaleTokens)}
	if index != nil && p.PrefixMatchInfoProducerName == "" {
		s.column, err = b.DefaultPrefix(index)
		return s, err
	}
	if s.column, err = b.Prefix(p.PrefixMatchInfoProducerName); err != nil {
		return nil, raw.Errorf("prefixMatchInfoProducerName", "%v", err)
	}
	return s, nil
}

// index translates the older parameters; nil when there are none.
func (p *prefixCacheParameters) index(raw config.Parameters) (*scheduler.PrefixParameters, error) {
	if p.AutoTune == nil && p.BlockSize == nil && p.HashBlockSize == nil && p.MaxPrefixBlocksToMatch == nil && p.LRUCapacityPerServer == nil {
		return nil, nil //nolint:nilnil // none is a valid answer
	}
	for path, v := range map[string]*int{
		"blockSize": p.BlockSize, "hashBlockSize": p.HashBlockSize,
		"maxPrefixBlocksToMatch": p.MaxPrefixBlocksToMatch, "lruCapacityPerServer": p.LRUCapacityPerServer,
	} {
		if v != nil && *v <= 0 {
			return nil, raw.Errorf(path, "%d, must be > 0", *v)
		}
	}
	out := scheduler.DefaultPrefixParameters()
	block := out.BlockSizeTokens
	switch {
	case p.BlockSize != nil:
		block = *p.BlockSize
	case p.HashBlockSize != nil:
		block = (*p.HashBlockSize + 3) / 4
	}
	out.BlockSizeTokens = block
	if p.MaxPrefixBlocksToMatch != nil {
		out.MaxPrefixTokensToMatch = *p.MaxPrefixBlocksToMatch * block
	}
	if p.LRUCapacityPerServer != nil {
		out.LRUCapacityPerServer = *p.LRUCapacityPerServer
	}
	if p.AutoTune != nil {
		out.AutoTune = *p.AutoTune
	}
	return &out, nil
}

// Score implements [scheduler.Scorer].
func (s *prefixCache) Score(cy *scheduler.Cycle, cands []scheduler.Candidate, out []float64) {
	prompt := &cy.Prompts[s.column]
	if prompt.Blocks == 0 {
		clear(out)
		return
	}
	total, perScale := float64(prompt.Blocks), float64(prompt.BlockSize)/s.scale
	for i := range cands {
		matched := float64(cands[i].Matched[s.column])
		length := min(1, matched*perScale)
		out[i] = s.weight*length*length + (1-s.weight)*min(1, matched/total)
	}
}
