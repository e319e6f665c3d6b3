// SPDX-License-Identifier: Apache-2.0

package inference

import (
	"errors"
	"math"
	"strconv"
	"strings"
)

// maxModel bounds model names, in raw bytes: they end up in headers and labels.
const maxModel = 4 << 10

// settle turns the last value of each field into what the request says.
func (p *parser) settle() {
	r := p.req
	r.Model = p.word(model, "model", maxModel)
	r.HasModel = p.top[model].kind == '"'
	r.CacheSalt = p.word(cacheSalt, "cache_salt", math.MaxInt)
	r.Stream = p.flag(p.top[stream], "stream")
	params := &p.top
	switch r.API {
	case Chat:
		r.MaxTokens = p.limit(p.top[maxTokens], "max_tokens")
		if t := p.top[maxCompletionTokens]; !absent(t) {
			r.MaxTokens = p.limit(t, "max_completion_tokens")
		}
	case Completions, Messages:
		r.MaxTokens = p.limit(p.top[maxTokens], "max_tokens")
	case Responses:
		r.MaxTokens = p.limit(p.top[maxOutputTokens], "max_output_tokens")
	case Generate:
		params = &p.sampling
		r.MaxTokens = p.limit(params[maxTokens], "max_tokens")
	case SGLangGenerate:
		params = &p.sampling
		r.MaxTokens = p.limit(params[maxNewTokens], "max_new_tokens")
		if r.CacheSalt == "" {
			r.CacheSalt = p.word(extraKey, "extra_key", math.MaxInt)
		}
	case Unknown, Embeddings:
	}
	if r.API != Messages && r.API != Responses && r.API != Embeddings {
		r.N = max(1, p.limit(params[choices], "n"))
	}
	p.settlePrompts()
	p.settleBars()
}

func (p *parser) settlePrompts() {
	r := p.req
	r.Prompts = 0
	for _, b := range p.batches {
		r.Prompts += b.prompts
		r.TokenIDs += b.tokenIDs
	}
	r.Prompts = max(1, r.Prompts)
	for _, s := range r.Text {
		r.TextBytes += s.Len()
	}
}

// settleBars finds what rules out disaggregation. In doubt, as with a flag that is no boolean, it is ruled out.
func (p *parser) settleBars() {
	r := p.req
	r.Bars = 0
	for _, params := range []*[scalars]token{&p.top, &p.sampling} {
		r.Bars |= p.bars(params)
	}
	if r.API == Responses {
		if p.says(p.top[truncation], "auto") {
			r.Bars |= BarTruncation
		}
		if !absent(p.top[previousResponseID]) {
			r.Bars |= BarPreviousResponse
		}
	}
	if r.Prompts > 1 {
		r.Bars |= BarSeveralPrompts
	}
	if r.API == Embeddings {
		r.Bars |= BarEmbeddings
	}
}

// bars reads those fields that may stand at the top level or in sampling_params.
func (p *parser) bars(params *[scalars]token) Bar {
	var b Bar
	if on, ok := p.boolean(params[echo]); on || !ok {
		b |= BarEcho
	}
	if on, ok := p.boolean(params[useBeamSearch]); on || !ok {
		b |= BarBeamSearch
	}
	if n, ok := p.integer(params[bestOf]); n > 1 || !ok {
		b |= BarBestOf
	}
	if !absent(params[promptLogprobs]) {
		b |= BarPromptLogprobs
	}
	if !absent(params[truncatePromptTokens]) {
		b |= BarTruncatePrompt
	}
	return b
}

// absent is true of null as well: the engines' fields are optional in that sense.
func absent(t token) bool { return t.kind == 0 || t.kind == 'n' }

// refuse fails with the name of a field whose value is wrong.
func (p *parser) refuse(t token, field, want string) {
	p.failAt(t.Start, field+" is not "+want)
}

// word returns what a string field says, "" when it is absent.
func (p *parser) word(n name, field string, limit int) string {
	t := p.top[n]
	switch {
	case absent(t):
		return ""
	case t.kind != '"':
		p.refuse(t, field, "a string")
		return ""
	case t.Len() > limit:
		p.refuse(t, field, "of a sensible length")
		return ""
	}
	buf := p.scratch[:]
	if t.Len() > len(buf) {
		buf = make([]byte, t.Len())
	}
	return string(content(buf, p.chunks, t))
}

func (p *parser) flag(t token, field string) bool {
	on, ok := p.boolean(t)
	if !ok {
		p.refuse(t, field, "a boolean")
	}
	return on
}

// boolean reads t as the engines do: pydantic takes some numbers and words for booleans.
func (p *parser) boolean(t token) (on, ok bool) {
	switch t.kind {
	case 0, 'n', 'f':
		return false, true
	case 't':
		return true, true
	case '0':
		n, ok := p.integer(t)
		return n == 1, ok && (n == 0 || n == 1)
	case '"':
		switch strings.ToLower(string(p.content(t))) {
		case "1", "on", "t", "true", "y", "yes":
			return true, true
		case "0", "off", "f", "false", "n", "no":
			return false, true
		}
	}
	return false, false
}

// limit reads a number of tokens or choices; what is no positive number counts as none sent, since the engine will say
// what is wrong with it.
func (p *parser) limit(t token, field string) int64 {
	n, ok := p.integer(t)
	if !ok {
		p.refuse(t, field, "an integer")
	}
	return max(0, n)
}

// integer reads t as the engines do: whole numbers in any notation, also as strings, and booleans. It is cut off at
// 32 bits, so that products of two do not overflow; 0 when absent.
func (p *parser) integer(t token) (n int64, ok bool) {
	switch t.kind {
	case 0, 'n', 'f':
		return 0, true
	case 't':
		return 1, true
	case '0', '"':
	default:
		return 0, false
	}
	raw := p.content(t)
	if t.Len() > maxKey {
		return 0, false
	}
	if n, err := strconv.ParseInt(string(raw), 10, 32); err == nil {
		return n, true
	}
	f, err := strconv.ParseFloat(string(raw), 64)
	if t.kind == '"' && strings.Trim(string(raw), "+-.0123456789") != "" || f != math.Trunc(f) {
		return 0, false
	}
	if err != nil && !errors.Is(err, strconv.ErrRange) {
		return 0, false
	}
	return int64(min(max(f, math.MinInt32), math.MaxInt32)), true
}
