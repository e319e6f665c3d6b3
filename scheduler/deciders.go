// SPDX-License-Identifier: Apache-2.0

package scheduler

import "github.com/baton-epp/baton/config"

// Reasons of the deciders.
const (
	reasonAlways     = "always"
	reasonOff        = "nonCachedTokens is 0"
	reasonShort      = "short prompt"
	reasonUncached   = "uncached prompt"
	reasonCached     = "prompt cached on the decode endpoint"
	reasonUnknown    = "no prefix knowledge"
	reasonMedia      = "media"
	reasonNoMedia    = "no media"
	reasonDecodeLast = "decode is picked later"
)

// prefixDecider is prefix-based-pd-decider: prefill runs apart when enough of the prompt is not on the decode endpoint.
type prefixDecider struct {
	// NonCachedTokens is the smallest uncached part of the prompt, in tokens, worth a prefill of its own; default 0,
	// which means never.
	NonCachedTokens int `yaml:"nonCachedTokens"`
	// PromptTokens is the shortest prompt, in tokens, that is looked at; default 0.
	PromptTokens int `yaml:"promptTokens"`

	column int
}

func newPrefixDecider(b *Builder, raw config.Parameters) (any, error) {
	d := &prefixDecider{}
	if err := raw.Decode(d); err != nil {
		return nil, err
	}
	if err := notNegative(raw, map[string]int{"nonCachedTokens": d.NonCachedTokens, "promptTokens": d.PromptTokens}); err != nil {
		return nil, err
	}
	column, err := b.Prefix("")
	d.column = column
	return d, err
}

// Decide implements [Decider].
func (d *prefixDecider) Decide(cy *Cycle, decode *Candidate) (run bool, reason string) {
	prompt := &cy.Prompts[d.column]
	switch {
	case d.NonCachedTokens == 0:
		return false, reasonOff
	case prompt.Tokens < max(d.NonCachedTokens, d.PromptTokens):
		return false, reasonShort
	case decode == nil:
		return false, reasonDecodeLast
	case prompt.BlockSize == 0:
		return false, reasonUnknown
	case prompt.Tokens-int(decode.Matched[d.column])*prompt.BlockSize < d.NonCachedTokens:
		return false, reasonCached
	}
	return true, reasonUncached
}

// always is always-disagg-pd-decider.
type always struct{}

func newAlwaysDecider(_ *Builder, raw config.Parameters) (any, error) {
	return always{}, raw.Decode(&struct{}{})
}

// Decide implements [Decider].
func (always) Decide(*Cycle, *Candidate) (run bool, reason string) { return true, reasonAlways }

// multimodal is always-disagg-multimodal-decider: a prompt with an image, video or audio part is encoded apart.
type multimodal struct{}

func newMultimodalDecider(_ *Builder, raw config.Parameters) (any, error) {
	return multimodal{}, raw.Decode(&struct{}{})
}

// Decide implements [Decider].
func (multimodal) Decide(cy *Cycle, _ *Candidate) (run bool, reason string) {
	if len(cy.Request.Media) == 0 {
		return false, reasonNoMedia
	}
	return true, reasonMedia
}
