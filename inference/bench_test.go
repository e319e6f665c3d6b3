// SPDX-License-Identifier: Apache-2.0

package inference

import (
	"fmt"
	"strings"
	"testing"

	"github.com/baton-epp/baton/internal/alloctest"
)

// sentence has what prompts have: quotes and line ends that JSON escapes, and words that are not ASCII.
const sentence = `The runner said: \"Take the baton, and don't let go.\"\nThen café lights went out; `

// chatBody is a chat request of about size bytes: a system prompt, then turns of about 1 KB or, if the body is large,
// of a quarter of it.
func chatBody(size int) []byte {
	turn := max(1<<10, size/4)
	var b strings.Builder
	b.WriteString(`{"model":"meta-llama/Llama-3.3-70B-Instruct","stream":true,"max_tokens":512,"temperature":0.7,"messages":[` +
		`{"role":"system","content":"You are a helpful assistant."}`)
	for i := 0; b.Len() < size-turn/2; i++ {
		fmt.Fprintf(&b, `,{"role":"%s","content":"%s"}`, [...]string{"user", "assistant"}[i%2], strings.Repeat(sentence, turn/len(sentence)))
	}
	b.WriteString(`],"stream_options":{"include_usage":true}}`)
	return []byte(b.String())
}

func tokenBody(n int) []byte {
	return []byte(`{"model":"m","token_ids":[` + strings.TrimSuffix(strings.Repeat("17523,", n), ",") + `],"sampling_params":{"max_tokens":4}}`)
}

func BenchmarkParse(b *testing.B) {
	run := func(name string, api API, body []byte, chunk int) {
		b.Run(name, func(b *testing.B) {
			var chunks Body
			for rest := body; len(rest) > 0; rest = rest[min(chunk, len(rest)):] {
				chunks.Append(rest[:min(chunk, len(rest))])
			}
			b.SetBytes(int64(len(body)))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := Parse(api, chunks); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	run("chat=4KB", Chat, chatBody(4<<10), 64<<10)
	run("chat=400KB", Chat, chatBody(400<<10), 64<<10)
	run("chat=400KB/chunks=16KB", Chat, chatBody(400<<10), 16<<10)
	run("chinese=400KB", Completions, []byte(`{"prompt":"`+strings.Repeat("接力赛跑，", 400<<10/15)+`"}`), 64<<10)
	run("tokens=400KB", Generate, tokenBody(68<<10), 64<<10)
}

func BenchmarkEdits(b *testing.B) {
	for _, size := range []int{4, 400} {
		b.Run(fmt.Sprintf("chat=%dKB", size), func(b *testing.B) {
			r, err := Parse(Chat, split(chatBody(size<<10), nil))
			if err != nil {
				b.Fatal(err)
			}
			b.ReportAllocs()
			for b.Loop() {
				if prefillEdits(r).Len() == 0 {
					b.Fatal("empty")
				}
			}
		})
	}
}

// prefillEdits are those of a prefill sub-request.
func prefillEdits(r *Request) *Edits {
	e := r.Edit()
	e.StripTransferFields()
	e.Set("stream", []byte("false"))
	e.Set("max_tokens", []byte("1"))
	e.Remove("stream_options")
	e.Remove("min_tokens")
	e.Set("kv_transfer_params", []byte(`{"do_remote_decode":true}`))
	return e
}

func BenchmarkUsage(b *testing.B) {
	token := []byte("data: {\"id\":\"chatcmpl-a116a85c3323fb83\",\"object\":\"chat.completion.chunk\",\"created\":1795314092,\"model\":\"tiny\"," +
		"\"choices\":[{\"index\":0,\"delta\":{\"content\":\" ho\"},\"logprobs\":null,\"finish_reason\":null,\"token_ids\":null}]}\n\n")
	run := func(name string, cut int) {
		b.Run(name, func(b *testing.B) {
			var u UsageScanner
			b.SetBytes(int64(len(token)))
			b.ReportAllocs()
			for b.Loop() {
				u.Feed(token[:cut])
				u.Feed(token[cut:])
			}
		})
	}
	run("chunk=event", len(token))
	run("chunk=half", len(token)/2)
}

func TestAllocations(t *testing.T) {
	f := func(name string, limit float64, api API, body []byte) {
		t.Helper()
		b := split(body, nil)
		alloctest.AtMost(t, limit, name, func() {
			if _, err := Parse(api, b); err != nil {
				t.Fatal(err)
			}
		})
	}
	f("4 KB chat", 4, Chat, chatBody(4<<10))
	f("400 KB chat", 4, Chat, chatBody(400<<10))
	f("400 KB of token ids", 4, Generate, tokenBody(68<<10))
	r, err := Parse(Chat, split(chatBody(4<<10), nil))
	if err != nil {
		t.Fatal(err)
	}
	alloctest.AtMost(t, 14, "edits", func() { prefillEdits(r).Len() })
}
