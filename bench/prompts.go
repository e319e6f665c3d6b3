// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"strings"
)

// marker is replaced in every request, so that no two prompts are equal. It has the length of what replaces it.
const marker = "@@request-marker"

// groups is how many shared prefixes there are: as many applications with a long system prompt each.
const groups = 8

// words have the lengths of English text; some need escapes in JSON, as real prompts do.
var words = strings.Fields(`the of and to in is that for it was on are as with his they at be this from have or by one had not
	but what all were when we there can an your which their said if do will each about how up out them then she many some so
	these would other into has more her two like him see time could no make than first been its who now people my made over
	did down only way find use may water long little very after words called just where most know get through back much
	before good new write our used me man too any day same right look think also around another came come work three word
	must because does part even place well such here take why things help put years different away again off went old number
	"quoted" naïve – 数据 path\to\file x<y a&b`)

// prose is n bytes of text, in lines; the same for the same seed.
func prose(seed, n int) string {
	r := rand.New(rand.NewPCG(uint64(seed), 1)) //nolint:gosec // seeds are small
	var b strings.Builder
	b.Grow(n + 32)
	for line := 0; b.Len() < n; {
		w := words[r.IntN(len(words))]
		b.WriteString(w)
		if line += len(w) + 1; line > 90 {
			b.WriteByte('\n')
			line = 0
		} else {
			b.WriteByte(' ')
		}
	}
	return strings.ToValidUTF8(b.String()[:n], "")
}

type chatMessage struct {
	Role    string `json:"role"`
	Content string `json:"content"`
}

// chatBody is a chat request of about size bytes. Its first half is the group's system prompt; the second, the user's,
// starts with the marker, so that everything after the shared half is new to a prefix cache.
func chatBody(group, size int) ([]byte, error) {
	const frame = 250 // what is not text, about
	text := max(size-frame, 64)
	body := struct {
		Model       string        `json:"model"`
		Messages    []chatMessage `json:"messages"`
		Stream      bool          `json:"stream"`
		Temperature float64       `json:"temperature"`
		MaxTokens   int           `json:"max_tokens"`
		User        string        `json:"user"`
	}{
		Model: "tiny", Stream: true, Temperature: 0.7, MaxTokens: 256, User: "bench",
		Messages: []chatMessage{
			{Role: "system", Content: prose(group+1, text/2)},
			{Role: "user", Content: marker + " " + prose(group+1001, text/2)},
		},
	}
	var out bytes.Buffer
	e := json.NewEncoder(&out)
	e.SetEscapeHTML(false)
	if err := e.Encode(body); err != nil {
		return nil, fmt.Errorf("chat body: %w", err)
	}
	return bytes.TrimSpace(out.Bytes()), nil
}

// tokenEvent is a server-sent event as vLLM streams one per token.
func tokenEvent(i int) []byte {
	return fmt.Appendf(nil, `data: {"id":"chatcmpl-4f0d6e7e5a0d4a7c8a3b","object":"chat.completion.chunk","created":1764000000,"model":"tiny",`+
		`"choices":[{"index":0,"delta":{"content":" %s"},"logprobs":null,"finish_reason":null}],"prompt_token_ids":null}`+"\n\n", words[i%100])
}

// lastEvent ends the stream, with usage.
const lastEvent = `data: {"id":"chatcmpl-4f0d6e7e5a0d4a7c8a3b","object":"chat.completion.chunk","created":1764000000,"model":"tiny",` +
	`"choices":[{"index":0,"delta":{"content":""},"logprobs":null,"finish_reason":"length","stop_reason":null}]}` + "\n\n" +
	`data: {"id":"chatcmpl-4f0d6e7e5a0d4a7c8a3b","object":"chat.completion.chunk","created":1764000000,"model":"tiny","choices":[],` +
	`"usage":{"prompt_tokens":1024,"total_tokens":1280,"completion_tokens":256,"prompt_tokens_details":{"cached_tokens":512}}}` + "\n\ndata: [DONE]\n\n"
