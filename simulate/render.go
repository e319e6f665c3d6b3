// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"encoding/json"
	"strings"
)

// rendered is a request for /inference/v1/generate, as the render routes make it of a completion or a chat.
type rendered struct {
	RequestID     string           `json:"request_id"`
	TokenIDs      []uint32         `json:"token_ids"`
	Offsets       null             `json:"token_offsets"`
	Features      *mediaFeatures   `json:"features"`
	ContentParts  null             `json:"content_parts"`
	Sampling      renderedSampling `json:"sampling_params"`
	Model         string           `json:"model"`
	Reasoning     null             `json:"reasoning_ended"`
	ReasoningArgs null             `json:"reasoning_parser_kwargs"`
	ReturnIDs     null             `json:"return_token_ids"`
	OutputMode    string           `json:"output_mode"`
	Stream        bool             `json:"stream"`
	StreamOptions json.RawMessage  `json:"stream_options"`
	CacheSalt     *string          `json:"cache_salt"`
	Priority      int              `json:"priority"`
	KVTransfer    json.RawMessage  `json:"kv_transfer_params"`
	ECTransfer    json.RawMessage  `json:"ec_transfer_params"`
}

type renderedSampling struct {
	Presence     json.RawMessage `json:"presence_penalty"`
	Frequency    json.RawMessage `json:"frequency_penalty"`
	Repetition   json.RawMessage `json:"repetition_penalty"`
	Temperature  json.RawMessage `json:"temperature"`
	TopP         json.RawMessage `json:"top_p"`
	MinP         json.RawMessage `json:"min_p"`
	N            int             `json:"n,omitempty"`
	Seed         json.RawMessage `json:"seed,omitempty"`
	Stop         []string        `json:"stop"`
	StopIDs      []int           `json:"stop_token_ids"`
	MaxTokens    int             `json:"max_tokens"`
	MinTokens    int             `json:"min_tokens,omitempty"`
	OutputKind   int             `json:"output_kind"`
	SkipClone    bool            `json:"skip_clone"`
	BadWords     []string        `json:"bad_words"`
	SkipReadings bool            `json:"skip_reading_prefix_cache"`
}

// serveRender answers with the tokens of a request, one object for a chat and a list for completions.
func (p *process) serveRender(x *exchange) {
	if !p.e.opts.ScaleOut {
		p.serveScaleOutOff(x)
		return
	}
	body, ok := x.readBody()
	if !ok {
		return
	}
	x.api = apiCompletions
	if strings.Contains(x.r.URL.Path, "/chat/") {
		x.api = apiChat
	}
	c, bad := p.e.parse(x.api, x.r.Header, body)
	if bad != nil {
		x.fail(bad)
		return
	}
	list := make([]rendered, 0, len(c.prompts))
	for _, tokens := range c.prompts {
		list = append(list, c.render(tokens))
	}
	if x.api == apiChat {
		x.json(200, marshal(list[0]))
		return
	}
	x.json(200, marshal(list))
}

func (c *call) render(tokens []uint32) rendered {
	r := rendered{
		RequestID: c.id, TokenIDs: tokens, Features: c.features(), Model: c.model, OutputMode: "tokens", Stream: c.stream,
		Sampling: renderedSampling{
			Presence: json.RawMessage("0.0"), Frequency: json.RawMessage("0.0"), Repetition: json.RawMessage("1.0"),
			Temperature: json.RawMessage(pythonFloat(c.temperature)), TopP: json.RawMessage("1.0"), MinP: json.RawMessage("0.0"),
			Stop: append([]string{}, c.stop...), StopIDs: []int{}, MaxTokens: c.maxTokens, MinTokens: c.minTokens,
			OutputKind: 2, SkipClone: true, BadWords: []string{},
		},
	}
	if c.maxTokens == 0 {
		r.Sampling.MaxTokens = c.modelLimit - len(tokens)
	}
	if c.n > 1 {
		r.Sampling.N = c.n
	}
	if seed, ok := c.fields.raw("seed"); ok {
		r.Sampling.Seed = seed
	}
	if c.cacheSalt != "" {
		r.CacheSalt = &c.cacheSalt
	}
	r.StreamOptions, _ = c.fields.raw("stream_options")
	r.KVTransfer, _ = c.fields.raw("kv_transfer_params")
	r.ECTransfer, _ = c.fields.raw("ec_transfer_params")
	return r
}

// mediaFeatures says where in the tokens the media items lie.
type mediaFeatures struct {
	Hashes       map[string][]string      `json:"mm_hashes"`
	Placeholders map[string][]placeholder `json:"mm_placeholders"`
	Kwargs       null                     `json:"kwargs_data"`
}

type placeholder struct {
	Offset int `json:"offset"`
	Length int `json:"length"`
}

func (c *call) features() *mediaFeatures {
	if len(c.media) == 0 {
		return nil
	}
	f := &mediaFeatures{Hashes: map[string][]string{}, Placeholders: map[string][]placeholder{}}
	for _, m := range c.media {
		f.Hashes[m.kind] = append(f.Hashes[m.kind], m.key)
		f.Placeholders[m.kind] = append(f.Placeholders[m.kind], placeholder{m.offset, mediaTokens})
	}
	return f
}
