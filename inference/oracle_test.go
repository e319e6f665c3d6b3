// SPDX-License-Identifier: Apache-2.0

package inference

import (
	"bytes"
	"encoding/json"
	"math"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// A node is a JSON value as encoding/json reads it, with its offsets. It is the tests' second opinion: nothing of the
// package's own scanner is used.
type node struct {
	kind       byte // { [ " 0 t f n, N for NaN and the infinities
	start, end int
	text       string // of strings and numbers
	keys       []string
	keyAt      []int // offsets of their opening quotes
	vals       []*node
}

// get returns the last member of that name, nil without one.
func (n *node) get(key string) *node {
	if n == nil || n.kind != '{' {
		return nil
	}
	for i, k := range slices.Backward(n.keys) {
		if k == key {
			return n.vals[i]
		}
	}
	return nil
}

// counts reports whether member i is the last of its name.
func (n *node) counts(i int) bool { return !slices.Contains(n.keys[i+1:], n.keys[i]) }

func (n *node) null() bool { return n == nil || n.kind == 'n' }

// oracle reads body; nil when encoding/json refuses it once Python's three literals are replaced by equally long JSON.
func oracle(body []byte) *node {
	if !utf8.Valid(body) {
		return nil
	}
	odd := map[int]bool{}
	plain := bytes.Clone(body)
	for i := 0; i < len(plain); i++ {
		switch plain[i] {
		case '"':
			for i++; i < len(plain) && plain[i] != '"'; i++ {
				if plain[i] == '\\' {
					i++
				}
			}
		case 'N', 'I', '-':
			for _, word := range []string{"NaN", "Infinity", "-Infinity"} {
				if bytes.HasPrefix(plain[i:], []byte(word)) {
					odd[i] = true
					copy(plain[i:], "["+strings.Repeat("1", len(word)-2)+"]")
					i += len(word) - 1
					break
				}
			}
		}
	}
	if !json.Valid(plain) {
		return nil
	}
	dec := json.NewDecoder(bytes.NewReader(plain))
	dec.UseNumber()
	return readNode(dec, plain, odd)
}

func readNode(dec *json.Decoder, body []byte, odd map[int]bool) *node {
	start := nextToken(dec, body)
	tok, err := dec.Token()
	if err != nil {
		return &node{kind: 'n', start: start, end: start}
	}
	n := &node{kind: body[start], start: start}
	switch tok := tok.(type) {
	case json.Delim:
		for dec.More() {
			if tok == '{' {
				n.keyAt = append(n.keyAt, nextToken(dec, body))
				key, _ := dec.Token()
				n.keys = append(n.keys, key.(string))
			}
			n.vals = append(n.vals, readNode(dec, body, odd))
		}
		_, _ = dec.Token()
		if odd[start] {
			n.kind, n.vals = 'N', nil
		}
	case string:
		n.text = tok
	case json.Number:
		n.kind, n.text = '0', string(tok)
	}
	n.end = int(dec.InputOffset())
	return n
}

// nextToken is the offset of the next token.
func nextToken(dec *json.Decoder, body []byte) int {
	at := int(dec.InputOffset())
	for strings.IndexByte(" \t\r\n,:", body[at]) >= 0 {
		at++
	}
	return at
}

func (n *node) depth() int {
	deepest := 0
	for _, v := range n.vals {
		deepest = max(deepest, v.depth())
	}
	if n.kind == '{' || n.kind == '[' {
		deepest++
	}
	return deepest
}

// expected is what a request should say, worked out the slow way.
type expected struct {
	Model, CacheSalt string
	HasModel, Stream bool
	MaxTokens, N     int64
	Prompts          int
	Text             []Span
	TokenIDs         int
	Media            []Media
	Bars             Bar
	Transfer         bool
	Refused          bool // a field has a wrong type
}

type expecter struct {
	expected
	root *node
}

func expect(api API, root *node) expected {
	x := expecter{root: root}
	x.N, x.Prompts = 1, 1
	x.transfer()
	if api == Unknown {
		x.Bars = BarNotJSON
		return x.expected
	}
	x.Model = x.word("model")
	x.HasModel = !root.get("model").null()
	x.CacheSalt = x.word("cache_salt")
	x.Stream = x.flag(root.get("stream"), &x.Refused)
	params := root
	if api == Generate || api == SGLangGenerate {
		params = root.get("sampling_params")
	}
	limits := map[API]string{
		Chat: "max_tokens", Completions: "max_tokens", Messages: "max_tokens", Generate: "max_tokens",
		Responses: "max_output_tokens", SGLangGenerate: "max_new_tokens",
	}
	var limit *node
	if limits[api] != "" {
		limit = params.get(limits[api])
	}
	if api == Chat {
		if v := root.get("max_completion_tokens"); !v.null() {
			x.whole(limit, &x.Refused)
			limit = v
		}
	}
	x.MaxTokens = max(0, x.whole(limit, &x.Refused))
	if api == SGLangGenerate && x.CacheSalt == "" {
		x.CacheSalt = x.word("extra_key")
	}
	if api == Chat || api == Completions || api == Generate || api == SGLangGenerate {
		x.N = max(1, x.whole(params.get("n"), &x.Refused))
	}
	x.prompt(api)
	x.bars(api)
	return x.expected
}

func (x *expecter) word(key string) string {
	v := x.root.get(key)
	if v.null() {
		return ""
	}
	if v.kind != '"' {
		x.Refused = true
	}
	return v.text
}

func (x *expecter) flag(v *node, refused *bool) bool {
	if v == nil {
		return false
	}
	switch v.kind {
	case 't':
		return true
	case 'f', 'n':
		return false
	case '0':
		f, _ := strconv.ParseFloat(v.text, 64)
		if f == 0 || f == 1 {
			return f == 1
		}
	case '"':
		switch low := strings.ToLower(v.text); {
		case slices.Contains([]string{"1", "on", "t", "true", "y", "yes"}, low):
			return true
		case slices.Contains([]string{"0", "off", "f", "false", "n", "no"}, low):
			return false
		}
	}
	*refused = true
	return false
}

func (x *expecter) whole(v *node, refused *bool) int64 {
	if v == nil || v.kind == 'n' || v.kind == 'f' {
		return 0
	}
	if v.kind == 't' {
		return 1
	}
	f, err := strconv.ParseFloat(v.text, 64)
	odd := v.kind == '"' && strings.Trim(v.text, "+-.0123456789") != ""
	if v.kind != '0' && v.kind != '"' || odd || v.end-v.start > maxKey || f != math.Trunc(f) || err != nil && !math.IsInf(f, 0) {
		*refused = true
		return 0
	}
	return int64(min(max(f, math.MinInt32), math.MaxInt32))
}

func isRouterField(key string) bool {
	return key == "kv_transfer_params" || key == "ec_transfer_params" || key == "disaggregated_params" ||
		strings.HasPrefix(key, "bootstrap_")
}

// transfer looks into every duplicate.
func (x *expecter) transfer() {
	look := func(n *node) {
		if n.kind == '{' && slices.ContainsFunc(n.keys, isRouterField) {
			x.Transfer = true
		}
	}
	if x.root.kind != '{' {
		return
	}
	look(x.root)
	for i, key := range x.root.keys {
		switch key {
		case "extra_args", "vllm_xargs":
			look(x.root.vals[i])
		case "sampling_params":
			objects := []*node{x.root.vals[i]}
			if objects[0].kind == '[' {
				objects = objects[0].vals
			}
			for _, o := range objects {
				look(o)
				for j, key := range o.keys {
					if key == "extra_args" || key == "vllm_xargs" {
						look(o.vals[j])
					}
				}
			}
		}
	}
}

func (x *expecter) bars(api API) {
	for _, params := range []*node{x.root, x.root.get("sampling_params")} {
		doubt := false
		if x.flag(params.get("echo"), &doubt) || doubt {
			x.Bars |= BarEcho
		}
		doubt = false
		if x.flag(params.get("use_beam_search"), &doubt) || doubt {
			x.Bars |= BarBeamSearch
		}
		doubt = false
		if x.whole(params.get("best_of"), &doubt) > 1 || doubt {
			x.Bars |= BarBestOf
		}
		if !params.get("prompt_logprobs").null() {
			x.Bars |= BarPromptLogprobs
		}
		if !params.get("truncate_prompt_tokens").null() {
			x.Bars |= BarTruncatePrompt
		}
	}
	if api == Responses {
		if v := x.root.get("truncation"); v != nil && v.kind == '"' && v.text == "auto" {
			x.Bars |= BarTruncation
		}
		if !x.root.get("previous_response_id").null() {
			x.Bars |= BarPreviousResponse
		}
	}
	if api == Embeddings {
		x.Bars |= BarEmbeddings
	}
	if x.Prompts > 1 {
		x.Bars |= BarSeveralPrompts
	}
}
