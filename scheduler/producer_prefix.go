// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/prefix"
)

const typePrefixProducer = "approx-prefix-cache-producer"

// PrefixParameters configure an approx-prefix-cache-producer (llm-d-router v0.10).
type PrefixParameters struct {
	// AutoTune takes an endpoint's capacity from its cache_config_info where that is known; default true.
	AutoTune bool `yaml:"autoTune"`
	// BlockSizeTokens is raised to 64, llm-d's floor; default 16.
	BlockSizeTokens int `yaml:"blockSizeTokens"`
	// MaxPrefixTokensToMatch limits how much of a prompt is looked at; default 131072, 0 = MaxPrefixBlocksToMatch.
	MaxPrefixTokensToMatch int `yaml:"maxPrefixTokensToMatch"`
	// LRUCapacityPerServer is the number of blocks remembered per endpoint; default 31250.
	LRUCapacityPerServer int `yaml:"lruCapacityPerServer"`
	// BlockSize is the deprecated name of BlockSizeTokens.
	BlockSize int `yaml:"blockSize"`
	// MaxPrefixBlocksToMatch is deprecated and used only when the token limit is 0; default 2048, 0 = no limit.
	MaxPrefixBlocksToMatch int `yaml:"maxPrefixBlocksToMatch"`
}

// DefaultPrefixParameters are llm-d's.
func DefaultPrefixParameters() PrefixParameters {
	return PrefixParameters{
		AutoTune:               true,
		BlockSizeTokens:        16,
		MaxPrefixTokensToMatch: prefix.DefaultMaxTokens,
		LRUCapacityPerServer:   prefix.DefaultCapacity,
		MaxPrefixBlocksToMatch: 2048,
	}
}

func (p *PrefixParameters) check(raw config.Parameters) error {
	return notNegative(raw, map[string]int{
		"blockSizeTokens":        p.BlockSizeTokens,
		"maxPrefixTokensToMatch": p.MaxPrefixTokensToMatch,
		"lruCapacityPerServer":   p.LRUCapacityPerServer,
		"blockSize":              p.BlockSize,
		"maxPrefixBlocksToMatch": p.MaxPrefixBlocksToMatch,
	})
}

// options are the index's.
func (p *PrefixParameters) options(maxBytes int64) prefix.Options {
	block := p.BlockSizeTokens
	if p.BlockSize > 0 {
		block = p.BlockSize
	}
	block = max(block, prefix.MinBlockTokens)
	limit := p.MaxPrefixTokensToMatch
	if limit == 0 {
		limit = p.MaxPrefixBlocksToMatch * block
	}
	return prefix.Options{
		BlockTokens: block, MaxTokens: limit, Capacity: p.LRUCapacityPerServer, AutoTune: p.AutoTune, MaxBytes: maxBytes,
	}
}

// prefixProducer is an index fed by routing decisions, as one column of the candidates.
type prefixProducer struct{ index *prefix.Index }

func newPrefixProducer(b *Builder, raw config.Parameters) (any, error) {
	p := DefaultPrefixParameters()
	if err := raw.Decode(&p); err != nil {
		return nil, err
	}
	if err := p.check(raw); err != nil {
		return nil, err
	}
	return b.producer(&p), nil
}

// producer makes the producer, around the index of the scheduler that is replaced where its blocks are the same.
func (b *Builder) producer(p *PrefixParameters) *prefixProducer {
	o := p.options(b.a.options.MaxIndexBytes)
	if prev := b.a.options.Previous; prev != nil {
		if old, ok := Plugins[*prefixProducer](prev)[b.Name]; ok && old.index.SetLimits(o) {
			return &prefixProducer{index: old.index}
		}
	}
	return &prefixProducer{index: prefix.New(o)}
}

// Match implements [Matcher].
func (p *prefixProducer) Match(req *inference.Request, m *Memory, cands []Candidate, column int) Prompt {
	p.index.Hash(req, &m.Keys)
	prompt := Prompt{Blocks: m.Keys.Blocks, BlockSize: p.index.BlockTokens(), Tokens: m.Keys.Tokens}
	if len(cands) == 0 {
		return prompt
	}
	p.index.Lookup(&m.Keys, &m.matches)
	for i := range cands {
		cands[i].Matched[column] = m.matches.Of(cands[i].Endpoint.Slot)
	}
	return prompt
}

// Learn implements [Matcher].
func (p *prefixProducer) Learn(m *Memory, st *pool.State) { p.index.Learn(st, &m.Keys) }

// Forget implements [Matcher].
func (p *prefixProducer) Forget(slot uint32) { p.index.Forget(slot) }
