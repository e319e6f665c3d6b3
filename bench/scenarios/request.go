// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"maps"
	"math/rand/v2"
	"strings"
)

const (
	promptTokens = 200
	longPrompt   = 7000 // some seconds of prefill
	answerTokens = 12
	seed         = 7
	barely       = 0.01 // a temperature: vLLM refuses several answers at 0
)

// request is one request to a model server.
type request struct {
	path string
	body map[string]any
}

// with returns a copy with further fields: name, value, name, value.
func (q request) with(fields ...any) request {
	q.body = maps.Clone(q.body)
	for i := 0; i+1 < len(fields); i += 2 {
		name, _ := fields[i].(string)
		q.body[name] = fields[i+1]
	}
	return q
}

// limit is the name of the API's token limit.
func (q request) limit() string {
	if q.path == pathResponses {
		return "max_output_tokens"
	}
	return "max_tokens"
}

// forPrefill is the prefill leg.
func (q request) forPrefill() request {
	return q.with(q.limit(), 1, "kv_transfer_params", map[string]any{"do_remote_decode": true, "do_remote_prefill": false})
}

// forDecode is the decode leg.
func (q request) forDecode(handle json.RawMessage) request {
	return q.with("kv_transfer_params", handle)
}

// alone keeps a server from answering from blocks that it or another one has: it must compute all by itself.
func (q request) alone() request { return q.with("cache_salt", "alone") }

func (q request) encode() []byte {
	text, err := json.Marshal(q.body)
	if err != nil {
		return nil // cannot happen: strings, numbers, and handles that were parsed
	}
	return text
}

const (
	pathCompletions = "/v1/completions"
	pathChat        = "/v1/chat/completions"
	pathResponses   = "/v1/responses"
	pathMessages    = "/v1/messages"
)

// newPrompt returns tokens that no server has seen.
func newPrompt(n int) []int {
	const first, count = 10, 1900 // of ids that the model has; the ones before are special
	out := make([]int, n)
	for i := range out {
		out[i] = first + rand.IntN(count)
	}
	return out
}

func (l *lab) completion(tokens int) request { return l.completionOf(newPrompt(tokens)) }

func (l *lab) completionOf(prompt any) request {
	return request{pathCompletions, map[string]any{
		"model": l.model, "prompt": prompt, "max_tokens": answerTokens, "temperature": 0, "seed": seed,
	}}
}

// written is a request with a new prompt of text to any API.
func (l *lab) written(path string) request {
	words := strings.Fields("self return import value index string class name list path file line error test module call")
	var text strings.Builder
	for range promptTokens {
		text.WriteString(words[rand.IntN(len(words))] + " ")
	}
	q := request{path, map[string]any{"model": l.model, "temperature": 0}}
	q = q.with(q.limit(), answerTokens)
	if path == pathResponses {
		return q.with("input", text.String())
	}
	return q.with("messages", []map[string]string{{"role": "user", "content": text.String()}})
}
