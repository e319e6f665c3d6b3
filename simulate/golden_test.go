// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"testing"
)

// golden is one captured exchange of a real vLLM.
type golden struct {
	name, request string
	status        int
	header        http.Header
	body          string
}

func readGolden(t *testing.T, dir, name string) golden {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", dir, name+".response.http"))
	if err != nil {
		t.Fatal(err)
	}
	head, body, ok := strings.Cut(strings.ReplaceAll(string(b), "\r\n", "\n"), "\n\n")
	if !ok {
		t.Fatalf("%s: no body", name)
	}
	g := golden{name: name, body: body, header: http.Header{}}
	lines := strings.Split(head, "\n")
	if _, err := fmt.Sscanf(lines[0], "HTTP/1.1 %d", &g.status); err != nil {
		t.Fatal(err)
	}
	for _, l := range lines[1:] {
		k, v, _ := strings.Cut(l, ": ")
		g.header.Add(k, v)
	}
	if req, err := os.ReadFile(filepath.Join("testdata", dir, name+".request.json")); err == nil {
		g.request = string(req)
	}
	return g
}

// shape writes a JSON value with its keys in order and its scalars as their types, so that two answers can be compared
// but for their texts and numbers. Arrays of scalars count as one.
func shape(t *testing.T, raw string) string {
	t.Helper()
	var out strings.Builder
	dec := json.NewDecoder(strings.NewReader(raw))
	dec.UseNumber()
	writeShape(t, dec, &out)
	return out.String()
}

func writeShape(t *testing.T, dec *json.Decoder, out *strings.Builder) {
	t.Helper()
	tok, err := dec.Token()
	if err != nil {
		t.Fatalf("shape: %v", err)
	}
	switch v := tok.(type) {
	case json.Delim:
		out.WriteString(v.String())
		last := ""
		for n := 0; dec.More(); n++ {
			if v == '{' {
				key, err := dec.Token()
				if err != nil {
					t.Fatal(err)
				}
				fmt.Fprintf(out, "%v:", key)
				writeShape(t, dec, out)
				out.WriteByte(' ')
				continue
			}
			var item strings.Builder
			writeShape(t, dec, &item)
			if s := item.String(); s != last {
				out.WriteString(s + " ")
				last = s
			}
		}
		end, err := dec.Token()
		if err != nil {
			t.Fatal(err)
		}
		out.WriteString(end.(json.Delim).String())
	case nil:
		out.WriteString("null")
	case json.Number:
		if strings.ContainsAny(v.String(), ".e") {
			out.WriteString("float")
		} else {
			out.WriteString("int")
		}
	default:
		fmt.Fprintf(out, "%T", tok)
	}
}

// events is the shape of a stream: event names and data shapes, equal neighbours once.
func events(t *testing.T, body string) []string {
	t.Helper()
	var out []string
	for ev := range strings.SplitSeq(strings.TrimSpace(body), "\n\n") {
		name, data, _ := strings.Cut(ev, "data: ")
		s := strings.TrimSpace(name) + " " + data
		if data != "[DONE]" {
			s = strings.TrimSpace(name) + " " + shape(t, data)
		}
		if len(out) == 0 || out[len(out)-1] != s {
			out = append(out, s)
		}
	}
	return out
}

// goldenOptions is the captured server: block size 32, 4096 tokens, request id headers on.
func goldenOptions(dir string) Options {
	o := Options{
		BlockSize: 32, NumBlocks: 400, MaxModelLen: 4096, RequestIDHeader: dir != "pd" && dir != "lora", ScaleOut: true, Scale: fast,
	}
	if dir == "lora" {
		o.LoRAs = []string{"sql", "chat"}
	}
	return o
}

func TestGolden(t *testing.T) {
	paths := map[string]string{
		"chat": "/v1/chat/completions", "completion": "/v1/completions", "messages": "/v1/messages", "responses": "/v1/responses",
		"tokenize": "/tokenize", "models": "/v1/models", "version": "/version", "health": "/health", "ping": "/ping",
		"generate": "/inference/v1/generate", "detokenize": "/detokenize", "messages_count_tokens": "/v1/messages/count_tokens",
		"embeddings": "/v1/embeddings", "not_found": "/nothing", "load": "/load", "weight_info": "/weight_info",
		"chat_render": "/v1/chat/completions/render", "completion_render": "/v1/completions/render",
	}
	for _, dir := range []string{"api", "err", "hdr", "pd", "lora"} {
		files, err := filepath.Glob(filepath.Join("testdata", dir, "*.response.http"))
		if err != nil || len(files) == 0 {
			t.Fatal(dir, err)
		}
		e := newEngine(t, goldenOptions(dir))
		for _, f := range files {
			name := strings.TrimSuffix(filepath.Base(f), ".response.http")
			t.Run(dir+"/"+name, func(t *testing.T) {
				g := readGolden(t, dir, name)
				compareGolden(t, e, g, goldenPath(paths, g))
			})
		}
	}
}

// goldenPath finds the path that a captured request went to: by its name, else by its fields.
func goldenPath(paths map[string]string, g golden) string {
	best := ""
	for prefix, p := range paths {
		if strings.HasPrefix(g.name, prefix) && len(prefix) > len(best) {
			best = prefix
			_ = p
		}
	}
	switch {
	case best != "":
		return paths[best]
	case strings.HasPrefix(g.name, "i_messages"):
		return paths["messages"]
	case strings.HasPrefix(g.name, "i_responses"):
		return paths["responses"]
	case strings.Contains(g.request, `"messages"`):
		return paths["chat"]
	}
	return paths["completion"]
}

func compareGolden(t *testing.T, e *Engine, g golden, path string) reply {
	t.Helper()
	header := map[string]string{
		"x_request_id": "X-Request-Id:my-id-123", "x_dp_rank_0": "X-Data-Parallel-Rank:0", "x_dp_rank_7": "X-Data-Parallel-Rank:7",
		"x_dp_rank_bad": "X-Data-Parallel-Rank:abc", "gzip_request": "Content-Encoding:gzip", "wrong_content_type": "Content-Type:text/plain",
		"options_cors": "Origin:http://example.com",
	}[g.name]
	name, value, _ := strings.Cut(header, ":")
	method := http.MethodPost
	if g.request == "" || g.name == "method" {
		method = http.MethodGet
	}
	var pairs []string
	if name != "" {
		pairs = []string{name, value}
	}
	if g.name == "options_cors" {
		method, pairs = http.MethodOptions, append(pairs, "Access-Control-Request-Method", http.MethodPost)
	}
	got, err := send(t.Context(), t, method, e.URL()+path, g.request, pairs...)
	if err != nil {
		t.Fatal(err)
	}
	if got.status != g.status {
		t.Fatalf("status %d, want %d: %s", got.status, g.status, got.body)
	}
	if g.name != "generate" && !strings.HasSuffix(g.name, "_render") { // captured on a server with other flags
		compareHeaders(t, got.header, g.header)
	}
	body := string(got.body)
	switch {
	case strings.HasPrefix(g.body, "data: "), strings.HasPrefix(g.body, "event: "):
		compareLines(t, events(t, body), events(t, g.body))
	case g.status >= 400:
		if body != g.body {
			t.Errorf("error body\n got %s\nwant %s", body, g.body)
		}
	case strings.TrimSpace(g.body) != "":
		compareLines(t, []string{shape(t, body)}, []string{shape(t, g.body)})
	default:
		if strings.TrimSpace(body) != "" {
			t.Errorf("body %q, want none", body)
		}
	}
	return got
}

func compareLines(t *testing.T, got, want []string) {
	t.Helper()
	for i := range max(len(got), len(want)) {
		g, w := "(nothing)", "(nothing)"
		if i < len(got) {
			g = got[i]
		}
		if i < len(want) {
			w = want[i]
		}
		if g != w {
			t.Errorf("part %d\n got %s\nwant %s", i, g, w)
		}
	}
}

// compareHeaders wants the same header names, and the same values where these are not the exchange's own.
func compareHeaders(t *testing.T, got, want http.Header) {
	t.Helper()
	names := func(h http.Header) string {
		var out []string
		for k := range h {
			if k != "Transfer-Encoding" { // net/http hides it
				out = append(out, k)
			}
		}
		sort.Strings(out)
		return strings.Join(out, " ")
	}
	if g, w := names(got), names(want); g != w {
		t.Errorf("headers\n got %s\nwant %s", g, w)
	}
	for _, k := range []string{"Content-Type", "Server", "Vary", "Allow"} {
		if got.Get(k) != want.Get(k) {
			t.Errorf("header %s: %q, want %q", k, got.Get(k), want.Get(k))
		}
	}
}

// TestGoldenNumbers compares what depends on tokens only: usage of prompts given as ids.
func TestGoldenNumbers(t *testing.T) {
	e := newEngine(t, goldenOptions("pd"))
	g := readGolden(t, "pd", "prefill_basic")
	got := post(t, e, "/v1/completions", g.request)
	usage := func(b []byte) string {
		var v struct {
			Usage json.RawMessage `json:"usage"`
			KV    struct {
				Blocks json.RawMessage `json:"remote_block_ids"`
				Tokens int             `json:"remote_num_tokens"`
			} `json:"kv_transfer_params"`
		}
		if err := json.Unmarshal(b, &v); err != nil {
			t.Fatal(err)
		}
		return fmt.Sprint(string(v.Usage), string(v.KV.Blocks), v.KV.Tokens)
	}
	if a, b := usage(got.body), usage([]byte(g.body)); a != b {
		t.Errorf("got %s\nwant %s", a, b)
	}
	if !bytes.Contains(got.body, []byte(`"transfer_mode":"pull"`)) {
		t.Error("no handle")
	}
}
