// SPDX-License-Identifier: Apache-2.0

package app

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/baton-epp/baton/manifests/envoy"
	"github.com/baton-epp/baton/simulate"
)

// roomy is a pool for prompts and answers of millions of tokens that cost no time.
func roomy() simulate.PoolOptions {
	o := fast(1, 1)
	o.Template.PrefillPerToken, o.Template.TransferPerToken, o.Template.InterToken = -1, -1, -1
	o.Template.BlockSize, o.Template.NumBlocks, o.Template.MaxModelLen = 1024, 4096, 4<<20
	o.Template.RecordBytes = 64 << 20
	return o
}

// oddBody is a chat request of about size bytes with spacing, escapes and numbers that only a byte for byte copy keeps.
func oddBody(size int, extra string) []byte {
	const head = " {\"model\" : \"tiny\",\t\"max_tokens\":3 , \"temperature\":0.0, \"x\":[1e2,123456789012345678901234567890, \"\\u00e9\\/\"],\n"
	words := strings.Repeat("caf\u00e9 \\n\\u0041 ", max(1, (size-len(head)-80)/16))
	return fmt.Appendf(nil, "%s%s \"messages\" : [ {\"role\":\"user\", \"content\":\"%d %s\"} ] }\r\n", head, extra, size, words)
}

// answerOf is what matters of a chat answer, streamed or not.
func answerOf(t *testing.T, body string) (content, finish string) {
	t.Helper()
	type choice struct {
		Message, Delta struct{ Content string }
		FinishReason   string `json:"finish_reason"`
	}
	var whole struct{ Choices []choice }
	if !strings.HasPrefix(body, "data: ") {
		if err := json.Unmarshal([]byte(body), &whole); err != nil || len(whole.Choices) != 1 {
			t.Fatalf("%v: %.300s", err, body)
		}
		return whole.Choices[0].Message.Content, whole.Choices[0].FinishReason
	}
	var text strings.Builder
	for line := range strings.SplitSeq(body, "\n") {
		data, ok := strings.CutPrefix(line, "data: ")
		if !ok || data == "[DONE]" {
			continue
		}
		var e struct{ Choices []choice }
		if err := json.Unmarshal([]byte(data), &e); err != nil {
			t.Fatalf("%v: %.300s", err, data)
		}
		for _, c := range e.Choices {
			text.WriteString(c.Delta.Content)
			if c.FinishReason != "" {
				finish = c.FinishReason
			}
		}
	}
	return text.String(), finish
}

// direct asks an engine without Envoy and the picker, for comparison.
func (s *stack) direct(e *simulate.Engine, path string, body []byte) string {
	s.t.Helper()
	req, err := http.NewRequestWithContext(s.t.Context(), http.MethodPost, e.URL()+path, bytes.NewReader(body))
	if err != nil {
		s.t.Fatal(err)
	}
	resp, err := s.client.Do(req)
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		s.t.Fatalf("direct: %v, %d: %.300s", err, resp.StatusCode, text)
	}
	return string(text)
}

// TestEnvoyBodies: whatever the size and the way it comes, the engine gets the bytes that were sent, apart from the
// edits, and the client the engine's answer.
func TestEnvoyBodies(t *testing.T) {
	t.Parallel()
	for _, name := range envoy.Names() {
		for mode, outcome := range map[string]string{"auto": "disaggregated", "off": "aggregated"} {
			t.Run(name+" "+mode, func(t *testing.T) {
				s := newStack(t, stackOptions{envoy: name, pool: roomy(), config: fmt.Sprintf("disaggregation: {mode: %q}\n", mode)})
				plain, err := simulate.New(roomy().Template)
				if err != nil {
					t.Fatal(err)
				}
				if err := plain.Start(); err != nil {
					t.Fatal(err)
				}
				defer plain.Close()
				for _, size := range []int{300, 70 << 10, 5 << 20} {
					for _, stream := range []string{"", `"stream":true,`} {
						sent := oddBody(size, stream)
						var body io.Reader = bytes.NewReader(sent)
						if size < 1000 {
							body = iotest.OneByteReader(body) // chunked, a byte each
						}
						s.client.CloseIdleConnections() // a kept one may be closing just now, which is not what is tested here
						r, err := s.try(t.Context(), http.MethodPost, "/v1/chat/completions", body)
						if err != nil {
							t.Fatal(err)
						}
						r.whole(t, outcome)
						arrived := s.bodies("decode")
						unchanged(t, fmt.Sprintf("%d bytes", size), arrived[len(arrived)-1].Body, sent)
						content, finish := answerOf(t, r.body)
						wantContent, wantFinish := answerOf(t, s.direct(plain, "/v1/chat/completions", sent))
						if content != wantContent || finish != wantFinish || content == "" {
							t.Errorf("%d bytes: answer %q %q, want %q %q", size, content, finish, wantContent, wantFinish)
						}
					}
				}
				s.settled()
			})
		}
	}
}

// TestEnvoyLargeAnswers: 5 MB come back whole, as one JSON text and as a stream.
func TestEnvoyLargeAnswers(t *testing.T) {
	t.Parallel()
	for _, name := range envoy.Names() {
		t.Run(name, func(t *testing.T) {
			s := newStack(t, stackOptions{envoy: name, pool: roomy()})
			s.setFaults("decode", simulate.Fault{Kind: "huge_body", Size: 5 << 20, RequestID: "huge"})
			r := s.post("/v1/chat/completions", chatBody(50, ""), "x-request-id", "huge")
			r.whole(t, "disaggregated")
			if len(r.body) < 5<<20 {
				t.Errorf("%d bytes", len(r.body))
			}
			const tokens = 20000
			many := strings.Replace(chatBody(50, `,"stream":true`), `"max_tokens":4`, fmt.Sprintf(`"max_tokens":%d`, tokens), 1)
			r = s.post("/v1/chat/completions", many)
			r.whole(t, "disaggregated")
			if content, finish := answerOf(t, r.body); len(content) < 4*tokens-1 || finish != "length" {
				t.Errorf("%d bytes of text, finish %q", len(content), finish)
			}
			s.settled()
		})
	}
}

// TestEnvoyRequestTrailers: a body that ends with trailers over h2c goes through, prefill and all.
func TestEnvoyRequestTrailers(t *testing.T) {
	t.Parallel()
	for _, name := range envoy.Names() {
		t.Run(name, func(t *testing.T) {
			s := newStack(t, stackOptions{envoy: name})
			protocols := new(http.Protocols)
			protocols.SetUnencryptedHTTP2(true)
			transport := &http.Transport{Protocols: protocols}
			defer transport.CloseIdleConnections()
			s.client = &http.Client{Transport: transport, Timeout: time.Minute}
			for _, body := range []io.Reader{bytes.NewReader(oddBody(300, "")), iotest.OneByteReader(bytes.NewReader(oddBody(300, "")))} {
				req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, s.envoy.URL+"/v1/chat/completions", io.NopCloser(body))
				if err != nil {
					t.Fatal(err)
				}
				req.Header.Set("Content-Type", "application/json")
				req.Trailer = http.Header{"X-Checksum": {"7"}}
				resp, err := s.client.Do(req)
				if err != nil {
					t.Fatal(err)
				}
				text, err := io.ReadAll(resp.Body)
				_ = resp.Body.Close()
				if err != nil || resp.ProtoMajor != 2 {
					t.Fatalf("%v, HTTP/%d", err, resp.ProtoMajor)
				}
				reply{resp.StatusCode, resp.Header, string(text), 0}.whole(t, "disaggregated")
				arrived := s.bodies("decode")
				unchanged(t, "with trailers", arrived[len(arrived)-1].Body, oddBody(300, ""))
			}
			s.settled()
		})
	}
}

// TestEnvoyWithoutBody: requests that have no body, or an empty one, end with the headers.
func TestEnvoyWithoutBody(t *testing.T) {
	t.Parallel()
	for _, name := range envoy.Names() {
		t.Run(name, func(t *testing.T) {
			s := newStack(t, stackOptions{envoy: name})
			for _, c := range []struct {
				method, path string
				status       int
			}{
				{http.MethodGet, "/v1/models", 200},
				{http.MethodHead, "/v1/models", 200},
				{http.MethodGet, "/health", 200},
				{http.MethodOptions, "/v1/models", 405},
				{http.MethodDelete, "/v2/unknown", 404},
				{http.MethodPost, "/v2/unknown", 404},
			} {
				r, err := s.try(t.Context(), c.method, c.path, http.NoBody)
				if err != nil || r.status != c.status {
					t.Errorf("%s %s: %v, %d, want %d: %s", c.method, c.path, err, r.status, c.status, r.body)
				}
				if r.header.Get("x-baton-outcome") != "aggregated" {
					t.Errorf("%s %s: outcome %q", c.method, c.path, r.header.Get("x-baton-outcome"))
				}
			}
			if r, err := s.try(t.Context(), http.MethodPost, "/v1/chat/completions", http.NoBody); err != nil || r.status < 400 || r.status >= 500 {
				t.Errorf("a chat without a body: %v, %d: %s", err, r.status, r.body)
			}
			s.settled()
		})
	}
}

// TestEnvoyBodyTooLarge: above the limit the client gets 413 in its API's form, and nobody is asked.
func TestEnvoyBodyTooLarge(t *testing.T) {
	t.Parallel()
	for _, name := range []string{envoy.QuietOverrideHost, envoy.BufferedOverrideHost} {
		t.Run(name, func(t *testing.T) {
			s := newStack(t, stackOptions{envoy: name, config: "limits: {maxBodyBytes: 100Ki}\n"})
			s.post("/v1/chat/completions", string(oddBody(90<<10, ""))).whole(t, "disaggregated")
			r := s.post("/v1/messages", string(oddBody(200<<10, "")))
			if r.status != http.StatusRequestEntityTooLarge || r.header.Get("x-llm-d-request-dropped-reason") != "body-too-large" || !strings.Contains(r.body, `"request_too_large"`) {
				t.Errorf("%d, %v: %s", r.status, r.header, r.body)
			}
			if n := s.seen("decode"); n != 1 {
				t.Errorf("%d decode requests, want 1", n)
			}
			s.settled()
		})
	}
}
