// SPDX-License-Identifier: Apache-2.0

package inference

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/baton-epp/baton/internal/alloctest"
)

// payload returns the body of a captured response.
func payload(tb testing.TB, name string) []byte {
	tb.Helper()
	raw, err := os.ReadFile(filepath.Join("testdata", name+".response.http"))
	if err != nil {
		tb.Fatal(err)
	}
	raw = bytes.ReplaceAll(raw, []byte("\r\n"), []byte("\n"))
	_, body, ok := bytes.Cut(raw, []byte("\n\n"))
	if !ok {
		tb.Fatalf("%s: no body", name)
	}
	return body
}

// scan feeds b in pieces of that size; 0 feeds each event by itself.
func scan(b []byte, size int) Usage {
	var u UsageScanner
	for len(b) > 0 {
		n := min(size, len(b))
		if size == 0 {
			if n = bytes.Index(b, []byte("\n\n")) + 2; n == 1 {
				n = len(b)
			}
		}
		u.Feed(b[:n])
		b = b[n:]
	}
	return u.Usage()
}

func TestUsageCaptured(t *testing.T) {
	f := func(name string, want Usage) {
		t.Helper()
		body := payload(t, name)
		for _, size := range []int{len(body), 0, 1, 2, 3, 7, 64, 1000} {
			if got := scan(body, size); got != want {
				t.Errorf("%s by %d: got %+v, want %+v", name, size, got, want)
			}
			crlf := bytes.ReplaceAll(body, []byte("\n"), []byte("\r\n"))
			if got := scan(crlf, size); got != want {
				t.Errorf("%s with CRLF by %d: got %+v, want %+v", name, size, got, want)
			}
		}
	}
	f("completion", Usage{true, 2, 8, 0, "length"})
	f("completion_batch", Usage{true, 5, 8, 0, "length"})
	f("chat_n2_logprobs", Usage{true, 33, 6, 32, "length"})
	f("chat_stream_usage", Usage{true, 33, 5, 32, "length"})
	f("completion_stream_usage_cont", Usage{true, 2, 5, 0, "length"})
	f("messages", Usage{true, 15, 6, 0, "max_tokens"})
	f("messages_stream", Usage{true, 15, 6, 0, "max_tokens"})
	f("responses", Usage{true, 15, 6, 0, "incomplete"})
	f("responses_stream", Usage{true, 15, 6, 0, "incomplete"})
	f("generate", Usage{true, 4, 4, 0, "length"})
	f("prefill_chat", Usage{true, 91, 1, 64, "length"})
	f("i_messages_prefill", Usage{true, 251, 1, 224, "max_tokens"})
}

func TestUsage(t *testing.T) {
	f := func(body string, want Usage) {
		t.Helper()
		for _, size := range []int{len(body), 0, 1, 2, 5} {
			if got := scan([]byte(body), max(size, 1)); got != want {
				t.Errorf("%q by %d: got %+v, want %+v", body, size, got, want)
			}
		}
	}
	f(``, Usage{})
	f(`{"usage":null}`, Usage{})
	f(`  {"usage":{"prompt_tokens" : 7 }}`, Usage{Seen: true, PromptTokens: 7})
	f(`{"error":{"usage":{"prompt_tokens":7}}}`, Usage{})
	f(`{"usage":{"prompt_tokens":1.5,"completion_tokens":1e3,"total_tokens":9}}`, Usage{})
	f(`{"usage":{"prompt_tokens":"7","completion_tokens":-1,"x":[{"prompt_tokens":3}]}}`, Usage{})
	f(`{"choices":[{"message":{"content":"{\"usage\":{\"prompt_tokens\":7}}"},"finish_reason":"stop"}]}`, Usage{FinishReason: "stop"})
	f(`{"choices":[{"finish_reason":"a reason that is much longer than any reason should be"}]}`, Usage{})
	f(`{"meta_info":{"id":"x","finish_reason":{"type":"length","length":16},"prompt_tokens":5,"completion_tokens":16,"cached_tokens":1}}`,
		Usage{true, 5, 16, 1, "length"})
	f("data: {\"text\":\"a\",\"meta_info\":{\"finish_reason\":null,\"prompt_tokens\":5,\"completion_tokens\":1,\"cached_tokens\":4}}\n\ndata: [DONE]\n\n",
		Usage{true, 5, 1, 4, ""})
	f("[{\"meta_info\":{\"prompt_tokens\":5}},{\"meta_info\":{\"completion_tokens\":6}}]", Usage{true, 5, 6, 0, ""})
	f("event: message_start\ndata: {\"message\":{\"usage\":{\"input_tokens\":9,\"cache_read_input_tokens\":8}}}\n\n"+
		"event: message_delta\ndata: {\"delta\":{\"stop_reason\":\"end_turn\"},\"usage\":{\"output_tokens\":3}}\n\n", Usage{true, 17, 3, 8, "end_turn"})
	f(": a comment with \"usage\"\n\ndata:{\"usage\":\ndata: {\"prompt_tokens\":1\ndata: }}\n\n", Usage{Seen: true, PromptTokens: 1})
	f("data: {\"usage\":{\"prompt_tokens\":1", Usage{})
	f("data: {\"usage\":{\"x\n\ndata: {\"usage\":{\"prompt_tokens\":2}}\n\n", Usage{Seen: true, PromptTokens: 2})
	f("datum: {\"usage\":{\"prompt_tokens\":2}}\n\n", Usage{})
	f(`{"a":`+strings.Repeat("[", 1000)+strings.Repeat("]", 1000)+`,"usage":{"prompt_tokens":2}}`, Usage{Seen: true, PromptTokens: 2})
	f(`{"`+strings.Repeat("k", 1000)+`":"x","usage":{"prompt_tokens":99999999999999999999}}`, Usage{Seen: true, PromptTokens: 1 << 50})
}

func TestUsageAllocations(t *testing.T) {
	chunk := []byte("data: {\"id\":\"chatcmpl-1\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\" ho\"},\"finish_reason\":null}]}\n\n")
	var u UsageScanner
	alloctest.AtMost(t, 0, "three pieces", func() { u.Feed(chunk); u.Feed(chunk[:50]); u.Feed(chunk[50:]) })
}

// slowUsage reads a response with encoding/json; ok false when it is not what a model server would write.
func slowUsage(body []byte) (u Usage, ok bool) {
	var docs [][]byte
	if trimmed := bytes.TrimLeft(body, " \t\r\n"); len(trimmed) > 0 && trimmed[0] == '{' {
		docs = [][]byte{trimmed}
	} else {
		for event := range bytes.SplitSeq(body, []byte("\n\n")) {
			data, found := bytes.CutPrefix(event, []byte("data:"))
			if !found || bytes.ContainsAny(data, "\r\n") {
				return u, false
			}
			docs = append(docs, data)
		}
	}
	for _, doc := range docs {
		var v struct {
			Usage *struct {
				Prompt     *int64 `json:"prompt_tokens"`
				Completion *int64 `json:"completion_tokens"`
				Details    *struct {
					Cached *int64 `json:"cached_tokens"`
				} `json:"prompt_tokens_details"`
			} `json:"usage"`
			Choices []struct {
				Reason *string `json:"finish_reason"`
			} `json:"choices"`
		}
		if json.Unmarshal(doc, &v) != nil || !plainKeys(doc) {
			return u, false
		}
		set := func(to, from *int64) {
			if from != nil {
				*to = *from
				u.Seen = true
			}
		}
		if v.Usage != nil {
			set(&u.PromptTokens, v.Usage.Prompt)
			set(&u.CompletionTokens, v.Usage.Completion)
			if v.Usage.Details != nil {
				set(&u.CachedTokens, v.Usage.Details.Cached)
			}
		}
		for _, c := range v.Choices {
			if c.Reason != nil {
				u.FinishReason = *c.Reason
			}
		}
	}
	return u, true
}

// plainKeys reports whether a document holds nothing that the scanner reads differently on purpose: other spellings
// of keys, duplicates, other APIs' fields, long words, negative or huge numbers.
func plainKeys(doc []byte) bool {
	n := oracle(doc)
	return n != nil && n.plain()
}

func (n *node) plain() bool {
	for i, key := range n.keys {
		known := strings.Contains("usage choices finish_reason prompt_tokens completion_tokens prompt_tokens_details cached_tokens", key)
		if !n.counts(i) || !known && strings.ContainsAny(key, "aeiouAEIOU\u017f\u212a") {
			return false
		}
	}
	for _, v := range n.vals {
		if !v.plain() {
			return false
		}
	}
	return len(n.text) < 12 && !strings.ContainsAny(n.text, "-+.eE\\\"\ufffd") && n.kind != 'N'
}

// FuzzUsage holds the scanner against itself on other chunks, and against encoding/json.
func FuzzUsage(f *testing.F) {
	files, _ := filepath.Glob("testdata/*.response.http")
	for _, file := range files {
		f.Add(payload(f, strings.TrimSuffix(filepath.Base(file), ".response.http")), []byte{5, 1})
	}
	f.Add([]byte(`{"choices":[{"finish_reason":"stop"}],"usage":{"prompt_tokens":1,"completion_tokens":2,"prompt_tokens_details":{"cached_tokens":3}}}`), []byte{1})
	f.Add([]byte("data: {\"choices\":[{\"finish_reason\":null}]}\n\ndata: {\"usage\":{\"prompt_tokens\":3}}"), []byte{40})
	f.Fuzz(func(t *testing.T, body, sizes []byte) {
		whole := scan(body, len(body))
		var u UsageScanner
		for _, chunk := range split(body, sizes).Chunks {
			u.Feed(chunk)
		}
		byEvent := scan(body, 0)
		if u.Usage() != whole || byEvent != whole {
			t.Fatalf("%q: whole %+v, split %+v, by event %+v", body, whole, u.Usage(), byEvent)
		}
		if want, ok := slowUsage(body); ok && want != whole {
			t.Fatalf("%q: got %+v, encoding/json %+v", body, whole, want)
		}
	})
}
