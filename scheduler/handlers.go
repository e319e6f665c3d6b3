// SPDX-License-Identifier: Apache-2.0

package scheduler

import (
	"cmp"
	"slices"
	"strings"

	"github.com/baton-epp/baton/config"
)

// newSingleHandler makes a single-profile-handler: the only profile serves the whole request.
func newSingleHandler(_ *Builder, raw config.Parameters) (any, error) {
	return &handler{single: true}, raw.Decode(&struct{}{})
}

// disaggParameters configure a disagg-profile-handler (llm-d-router v0.10).
type disaggParameters struct {
	// StageOrder is decode-first (default) or prefill-first, in any case, with _ for -, the "-first" may be left out.
	StageOrder string `yaml:"stageOrder"`
	// Profiles are profile names; default decode, prefill, encode.
	Profiles struct {
		Decode  string `yaml:"decode"`
		Prefill string `yaml:"prefill"`
		Encode  string `yaml:"encode"`
	} `yaml:"profiles"`
	// Deciders are plugin names; a phase without a decider does not run, but for a prefill-first prefill.
	Deciders struct {
		Prefill string `yaml:"prefill"`
		Encode  string `yaml:"encode"`
	} `yaml:"deciders"`

	// The older, flat spelling of the same.
	DecodeProfile            string `yaml:"decodeProfile"`
	PrefillProfile           string `yaml:"prefillProfile"`
	EncodeProfile            string `yaml:"encodeProfile"`
	PrefillDeciderPluginName string `yaml:"prefillDeciderPluginName"`
	DeciderPluginName        string `yaml:"deciderPluginName"`
	EncodeDeciderPluginName  string `yaml:"encodeDeciderPluginName"`
}

func newDisaggHandler(b *Builder, raw config.Parameters) (any, error) {
	var p disaggParameters
	if err := raw.Decode(&p); err != nil {
		return nil, err
	}
	nested := p.Profiles.Decode + p.Profiles.Prefill + p.Profiles.Encode + p.Deciders.Prefill + p.Deciders.Encode
	flat := p.DecodeProfile + p.PrefillProfile + p.EncodeProfile + p.PrefillDeciderPluginName + p.DeciderPluginName + p.EncodeDeciderPluginName
	if nested != "" && flat != "" {
		return nil, raw.Errorf("", "profiles and deciders are given in both spellings; keep profiles{} and deciders{}")
	}
	h := &handler{
		decode:  cmp.Or(p.Profiles.Decode, p.DecodeProfile, "decode"),
		prefill: cmp.Or(p.Profiles.Prefill, p.PrefillProfile, "prefill"),
		encode:  cmp.Or(p.Profiles.Encode, p.EncodeProfile, "encode"),
	}
	h.explicit = given(p.Profiles.Decode, p.Profiles.Prefill, p.Profiles.Encode, p.DecodeProfile, p.PrefillProfile, p.EncodeProfile)
	switch strings.TrimSuffix(strings.ReplaceAll(strings.ToLower(p.StageOrder), "_", "-"), "-first") {
	case "", "decode":
	case "prefill":
		h.prefillFirst = true
	default:
		return nil, raw.Errorf("stageOrder", "%q, must be decode-first or prefill-first", p.StageOrder)
	}
	prefillDecider := cmp.Or(p.Deciders.Prefill, p.PrefillDeciderPluginName, p.DeciderPluginName)
	if h.prefillFirst && prefillDecider != "" {
		return nil, raw.Errorf("deciders.prefill", "%q: prefill-first runs prefill always, without a decider", prefillDecider)
	}
	var err error
	if h.prefillDecider, err = b.optionalDecider(raw, "deciders.prefill", prefillDecider); err != nil {
		return nil, err
	}
	encodeDecider := cmp.Or(p.Deciders.Encode, p.EncodeDeciderPluginName)
	if encodeDecider != "" {
		b.warnEncode()
	}
	if h.encodeDecider, err = b.optionalDecider(raw, "deciders.encode", encodeDecider); err != nil {
		return nil, err
	}
	_, err = b.Prefix("") // llm-d's handler requires the default producer
	return h, err
}

// warnEncode says when an encode decider has nobody to decide for. Encoders are named to sidecars (mode headers, and auto
// where the decode endpoint has one) without a connector of ours.
func (b *Builder) warnEncode() {
	c := &b.a.config.Disaggregation
	switch {
	case c.ECConnector != "":
	case c.Mode == "orchestrate":
		b.Warn("the encode phase never runs: %s", reasonNoEncoders)
	case c.Mode == "auto":
		b.Warn("the encode phase runs only for decode endpoints that have a sidecar: %s", reasonNoEncoders)
	}
}

// optionalDecider finds a decider; an empty name is none.
func (b *Builder) optionalDecider(raw config.Parameters, path, name string) (Decider, error) {
	if name == "" {
		return nil, nil //nolint:nilnil // no decider is a valid answer
	}
	d, err := b.decider(name)
	if err != nil {
		return nil, raw.Errorf(path, "%v", err)
	}
	return d, nil
}

// given returns the names that are not empty.
func given(names ...string) []string {
	return slices.DeleteFunc(names, func(s string) bool { return s == "" })
}

// pdParameters configure the deprecated pd-profile-handler.
type pdParameters struct {
	DecodeProfile     string `yaml:"decodeProfile"`     // default decode
	PrefillProfile    string `yaml:"prefillProfile"`    // default prefill
	DeciderPluginName string `yaml:"deciderPluginName"` // default prefix-based-pd-decider, must be defined
	PrimaryPort       int    `yaml:"primaryPort"`       // 0 = off; data parallelism is not built yet

	PrefixPluginType            string `yaml:"prefixPluginType"` // ignored
	PrefixPluginName            string `yaml:"prefixPluginName"` // ignored
	PrefixMatchInfoProducerName string `yaml:"prefixMatchInfoProducerName"`

	// Threshold is the oldest spelling of the decider: the uncached part of the prompt, in characters, from which on
	// prefill runs apart; 0 = always.
	Threshold *int `yaml:"threshold"`
	// HashBlockSize belongs to Threshold and is ignored: the producer knows its block size.
	HashBlockSize int `yaml:"hashBlockSize"`
}

func newPDHandler(b *Builder, raw config.Parameters) (any, error) {
	p := pdParameters{DecodeProfile: "decode", PrefillProfile: "prefill"}
	if err := raw.Decode(&p); err != nil {
		return nil, err
	}
	b.Warn("type pd-profile-handler is deprecated: use disagg-profile-handler")
	if p.PrimaryPort != 0 {
		return nil, raw.Errorf("primaryPort", "%d: data parallelism is known to llm-d, not built in Baton yet", p.PrimaryPort)
	}
	h := &handler{decode: p.DecodeProfile, prefill: p.PrefillProfile, explicit: []string{p.DecodeProfile, p.PrefillProfile}}
	column, err := b.Prefix(p.PrefixMatchInfoProducerName)
	if err != nil {
		return nil, raw.Errorf("prefixMatchInfoProducerName", "%v", err)
	}
	switch {
	case p.Threshold == nil || p.DeciderPluginName != "":
		h.prefillDecider, err = b.optionalDecider(raw, "deciderPluginName", cmp.Or(p.DeciderPluginName, "prefix-based-pd-decider"))
	case *p.Threshold < 0:
		err = raw.Errorf("threshold", "%d, must be ≥ 0", *p.Threshold)
	case *p.Threshold == 0:
		h.prefillDecider = always{}
	default:
		h.prefillDecider = &prefixDecider{NonCachedTokens: (*p.Threshold + 3) / 4, column: column}
	}
	if err != nil {
		return nil, err
	}
	return h, nil
}
