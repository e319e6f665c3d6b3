// SPDX-License-Identifier: Apache-2.0

package app

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf16"

	"github.com/baton-epp/baton/manifests/envoy"
	"github.com/baton-epp/baton/simulate"
)

// evil is a transfer field that ends a real decode server's process; the mark shows wherever it arrives.
const evil = `{"do_remote_prefill":true,"do_remote_decode":false,"remote_engine_id":"evil","remote_host":"evil","remote_port":1,"remote_block_ids":null}`

// smuggled is one way to bring evil past the picker.
type smuggled struct {
	name, method, path, kind, encoding string
	body                               []byte
	statuses                           []int // that may be answered; nil is 200
}

// refused are the answers to what cannot be inspected.
var refused = []int{http.StatusBadRequest, http.StatusUnsupportedMediaType}

func smuggles() []smuggled {
	const head = `{"model":"tiny","max_tokens":2,"messages":[{"role":"user","content":"hello"}]`
	plain := head + `,"kv_transfer_params":` + evil + `}`
	list := []smuggled{
		{name: "as it is", body: []byte(plain)},
		{name: "duplicate", body: []byte(head + `,"kv_transfer_params":null,"kv_transfer_params":` + evil + `,"x":1,"kv_transfer_params":` + evil + `}`)},
		{name: "escaped key", body: []byte(head + `,"\u006bv_transfer\u005Fparams":` + evil + `}`)},
		{name: "escaped duplicate", body: []byte(`{"kv_transfer_params":{},"kv_transfer_param\u0073":` + evil + `,` + head[1:] + `}`)},
		{name: "ec_transfer_params", body: []byte(head + `,"ec_transfer_params":` + evil + `}`)},
		{name: "disaggregated_params", body: []byte(head + `,"disaggregated_params":` + evil + `}`)},
		{name: "bootstrap", body: []byte(head + `,"bootstrap_host":"evil","bootstrap_port":1,"bootstrap_room":7}`)},
		{name: "vllm_xargs", body: []byte(head + `,"vllm_xargs":{"kv_transfer_params":` + evil + `}}`)},
		{name: "white space", body: []byte(strings.ReplaceAll(strings.ReplaceAll(plain, ":", " \t: \r\n"), ",", " , "))},
		{name: "NaN beside", body: []byte(head + `,"top_p":NaN,"kv_transfer_params":` + evil + `}`)},
		{name: "depth", body: []byte(head + `,"metadata":` + strings.Repeat(`[`, 300) + strings.Repeat(`]`, 300) + `,"kv_transfer_params":` + evil + `}`), statuses: []int{200, 400}},
		{name: "BOM", body: []byte("\xef\xbb\xbf" + plain), statuses: []int{200, 400}},
		{name: "two objects", body: []byte(head + "}" + plain), statuses: refused},
		{name: "a list", body: []byte("[" + plain + "]"), statuses: refused},
		{name: "bad UTF-8", body: []byte(strings.Replace(plain, "hello", "\xff\xfe", 1)), statuses: []int{200, 400}},
		{name: "a comment", body: []byte(strings.Replace(plain, "{", "{/*", 1)), statuses: refused},
		{name: "UTF-16 LE", body: wide(plain, false, true), statuses: refused},
		{name: "UTF-16 BE", body: wide(plain, true, true), statuses: refused},
		{name: "UTF-16 LE without a mark", body: wide(plain, false, false), statuses: refused},
		{name: "UTF-16 BE without a mark", body: wide(plain, true, false), statuses: refused},
		{name: "gzip", body: zipped(plain), encoding: "gzip", statuses: refused},
		{name: "gzip, unsaid", body: zipped(plain), statuses: refused},
		{name: "gzip of another name", body: []byte(plain), encoding: "x-evil", statuses: refused},
		{name: "text/plain", kind: "text/plain", body: []byte(plain)},
		{name: "no type", kind: " ", body: []byte(plain)},
		{name: "a form", kind: "application/x-www-form-urlencoded", body: []byte(plain)},
		{name: "octets", kind: "application/octet-stream", body: []byte(plain)},
		{name: "GET", method: http.MethodGet, body: []byte(plain)},
		{name: "PUT", method: http.MethodPut, body: []byte(plain)},
		{name: "charset", kind: "application/json; charset=utf-16", body: []byte(plain), statuses: []int{200, 400, 415}},
		{
			name: "extra_args", path: "/inference/v1/generate",
			body: []byte(`{"model":"tiny","token_ids":[1,2,3],"sampling_params":{"max_tokens":1,"extra_args":{"kv_transfer_params":` + evil + `}}}`),
		},
		{
			name: "extra_args, duplicate and escaped", path: "/inference/v1/generate",
			body: []byte(`{"model":"tiny","token_ids":[1,2,3],"sampling_params":{},"sampling_\u0070arams":{"extra_args":{},"extra\u005fargs":{"kv_transfer_params":1,"\u006bv_transfer_params":` + evil + `}},"kv_transfer_params":` + evil + `}`),
		},
	}
	for _, path := range []string{
		"/v1/completions", "/v1/responses", "/v1/messages", "/v1/embeddings", "/generate", "/v1/chat/completions?stream=1&x=/v1/models",
		"/v1/chat/completions/", "/v1//chat///completions", "//v1/chat/completions//", "/v1/chat/%63ompletions", "/v1/chat%2Fcompletions",
		"/v1/./chat/x/../completions", "/v1/chat/completions%0A", "/a/model/v1/chat/completions", "/invocations", "/pooling", "/v2/unknown",
		"/v1/chat/completions;x=1", "/V1/CHAT/COMPLETIONS", "/tokenize",
	} {
		list = append(list, smuggled{name: path, path: path, body: []byte(plain)})
	}
	for _, path := range []string{"/v2/unknown", "/V1/chat/completions"} {
		list = append(list,
			smuggled{name: "text at " + path, path: path, kind: "text/plain", body: []byte(" \n" + plain)},
			smuggled{name: "UTF-16 at " + path, path: path, body: wide(plain, false, false), statuses: refused},
			smuggled{name: "gzip at " + path, path: path, body: zipped(plain), encoding: "gzip", statuses: refused})
	}
	return list
}

// wide is text in UTF-16.
func wide(text string, big, mark bool) []byte { //nolint:unparam // a helper that says what it is given
	var out []byte
	if mark {
		text = "\ufeff" + text
	}
	for _, u := range utf16.Encode([]rune(text)) {
		if big {
			out = append(out, byte(u>>8), byte(u))
		} else {
			out = append(out, byte(u), byte(u>>8))
		}
	}
	return out
}

func zipped(text string) []byte {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	_, _ = w.Write([]byte(text)) // a bytes.Buffer takes everything
	_ = w.Close()
	return b.Bytes()
}

func (c *smuggled) send(s *stack) reply {
	s.t.Helper()
	headers := []string{"X-Gateway-Destination-Endpoint", s.engines("prefill")[0].Addr().String(), "X-Prefiller-Host-Port", "evil:1"}
	if c.kind != "" {
		headers = append(headers, "Content-Type", strings.TrimSpace(c.kind))
	}
	if c.encoding != "" {
		headers = append(headers, "Content-Encoding", c.encoding)
	}
	method, path := c.method, c.path
	if method == "" {
		method = http.MethodPost
	}
	if path == "" {
		path = "/v1/chat/completions"
	}
	r, err := s.try(s.t.Context(), method, path, bytes.NewReader(c.body), headers...)
	if err != nil {
		s.t.Fatal(err)
	}
	return r
}

// TestEnvoySmuggledTransferFields sends a field that would end a decode server in every spelling, to a server that
// keeps whatever it gets.
func TestEnvoySmuggledTransferFields(t *testing.T) {
	t.Parallel()
	for _, name := range []string{envoy.QuietOverrideHost, envoy.BufferedOverrideHost} {
		t.Run(name, func(t *testing.T) {
			catch := newTap(t)
			s := newStack(t, stackOptions{
				envoy: name, pool: fast(1, 1), rewrite: withoutMutation, config: "disaggregation: {mode: \"off\"}\n",
				values: func(v *envoy.Values) { v.Endpoints = append(v.Endpoints, catch.addr) },
			})
			s.writeEndpointLines(endpointLines("tap", catch.addr, "decode"))
			for _, c := range smuggles() {
				t.Run(c.name, func(t *testing.T) {
					r := c.send(s)
					if want := append([]int{}, c.statuses...); !slices.Contains(append(want, map[bool]int{true: 200}[len(want) == 0]), r.status) {
						t.Errorf("status %d: %.300s", r.status, r.body)
					}
					got := catch.take()
					if (r.status == http.StatusOK) != (len(got) == 1) {
						t.Errorf("status %d, and %d requests arrived", r.status, len(got))
					}
					for _, g := range got {
						arrivedClean(t, &g, catch.addr.String())
					}
				})
			}
			s.settled()
		})
	}
}

// arrivedClean asserts that nothing of the client's that only a picker may send is in a request.
func arrivedClean(t *testing.T, g *simulate.Recorded, destination string) {
	t.Helper()
	if bytes.Contains(bytes.ReplaceAll(g.Body, []byte{0}, nil), []byte("evil")) {
		t.Errorf("%s: the field arrived: %s", g.URI, g.Body)
	}
	for name, values := range g.Header {
		if strings.Contains(strings.Join(values, " "), "evil") && name != "Content-Encoding" {
			t.Errorf("%s: header %s: %v", g.URI, name, values)
		}
	}
	if d := g.Header.Values("X-Gateway-Destination-Endpoint"); !slices.Equal(d, []string{destination}) {
		t.Errorf("%s: destination %v, want %s", g.URI, d, destination)
	}
}

// TestEnvoySmuggledTransferFieldsKillNobody sends the same to engines that die of it, with prefills running beside.
func TestEnvoySmuggledTransferFieldsKillNobody(t *testing.T) {
	t.Parallel()
	o := fast(1, 1)
	o.Template.ScaleOut, o.Template.Lease = true, 5*time.Second
	s := newStack(t, stackOptions{pool: o, rewrite: withoutMutation})
	// The engines do die of it: else this proves nothing.
	victim, err := simulate.New(simulate.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := victim.Start(); err != nil {
		t.Fatal(err)
	}
	defer victim.Close()
	direct, err := http.Post(victim.URL()+"/v1/chat/completions", "application/json", bytes.NewReader(smuggles()[0].body))
	if err == nil {
		_ = direct.Body.Close()
	}
	eventually(t, "an unprotected engine dies", func() bool { return len(victim.Deaths()) == 1 })
	lost := 0 // prefills whose decode request no engine route took
	for _, c := range smuggles() {
		if r := c.send(s); r.header.Get("x-baton-outcome") == "disaggregated" && r.status != http.StatusOK {
			if lost++; r.status != http.StatusNotFound && r.status != http.StatusTemporaryRedirect {
				t.Errorf("%s: %d after a prefill", c.name, r.status)
			}
		}
	}
	for _, b := range append(s.bodies("prefill"), s.bodies("decode")...) {
		if bytes.Contains(b.Body, []byte("evil")) {
			t.Errorf("%s: the field arrived: %s", b.URI, b.Body)
		}
	}
	s.settledWith(lost)
}

// TestEnvoySpoofedControlHeaders: no control header of a client reaches an engine or chooses one, with and without the
// filter that our configurations have for it.
func TestEnvoySpoofedControlHeaders(t *testing.T) {
	t.Parallel()
	for _, name := range envoy.Names() {
		for label, rewrite := range map[string]func(string) string{"": nil, " without filter": withoutMutation} {
			t.Run(name+label, func(t *testing.T) {
				s := newStack(t, stackOptions{envoy: name, rewrite: rewrite, pool: fast(1, 2)})
				headers := []string{"x-baton-outcome", "evil", "x-llm-d-request-dropped-reason", "evil", "x-gateway-destination-endpoint-subset", "evil"}
				for _, h := range envoy.ControlHeaders() {
					headers = append(headers, h, "evil:1")
				}
				headers = append(headers, "x-gateway-destination-endpoint", s.engines("prefill")[0].Addr().String(), "x-envoy-retry-on", "5xx", "x-envoy-max-retries", "3")
				s.post("/v1/chat/completions", chatBody(50, ""), headers...).whole(t, "disaggregated")
				for _, b := range append(s.bodies("prefill"), s.bodies("decode")...) {
					if b.Phase == "prefill" {
						if len(b.Header.Values("X-Gateway-Destination-Endpoint")) != 0 || b.Attempt != "1" || strings.Contains(fmt.Sprint(b.Header), "evil") {
							t.Errorf("prefill: %v", b.Header)
						}
						continue
					}
					arrivedClean(t, &b, b.Header.Get("X-Gateway-Destination-Endpoint"))
					if d := b.Header.Get("X-Gateway-Destination-Endpoint"); d != s.engines("decode")[0].Addr().String() && d != s.engines("decode")[1].Addr().String() {
						t.Errorf("sent to %s", d)
					}
					if p := b.Header.Values("X-Prefiller-Host-Port"); !slices.Equal(p, []string{s.engines("prefill")[0].Addr().String()}) {
						t.Errorf("prefiller %v", p)
					}
				}
				// A request that claims to be our own sub-request is refused, not passed on.
				r := s.post("/v1/chat/completions", chatBody(50, ""), "x-baton-depth", "1")
				if r.status != http.StatusLoopDetected || s.seen("decode") != 1 {
					t.Errorf("depth: status %d, %d decode requests: %s", r.status, s.seen("decode"), r.body)
				}
				s.settled()
			})
		}
	}
}

// TestEnvoyEmptyPool: nobody to send to is 503 in the API's own form, whatever destination the client names.
func TestEnvoyEmptyPool(t *testing.T) {
	t.Parallel()
	for _, name := range envoy.Names() {
		t.Run(name, func(t *testing.T) {
			s := newStack(t, stackOptions{envoy: name, rewrite: withoutMutation})
			s.writeEndpoints()
			victim := s.engines("decode")[0]
			for path, kind := range map[string]string{"/v1/chat/completions": "ServiceUnavailableError", "/v1/messages": "overloaded_error", "/v2/unknown": "ServiceUnavailableError"} {
				r := s.post(path, chatBody(50, ""), "x-gateway-destination-endpoint", victim.Addr().String())
				if r.status != http.StatusServiceUnavailable || r.header.Get("x-llm-d-request-dropped-reason") != "rejected-no-endpoints" || r.header.Get("Content-Type") != "application/json" {
					t.Errorf("%s: %d, %v", path, r.status, r.header)
				}
				var body struct {
					Type  string
					Error struct {
						Type, Message string
						Code          int
					}
				}
				if err := json.Unmarshal([]byte(r.body), &body); err != nil || body.Error.Type != kind || body.Error.Message == "" {
					t.Errorf("%s: %v: %s", path, err, r.body)
				}
				if openAI := path != "/v1/messages"; openAI != (body.Error.Code == 503) || openAI == (body.Type == "error") {
					t.Errorf("%s: not the form of its API: %s", path, r.body)
				}
			}
			r, err := s.try(t.Context(), http.MethodGet, "/v1/models", http.NoBody, "x-gateway-destination-endpoint", victim.Addr().String())
			if err != nil || r.status != http.StatusServiceUnavailable {
				t.Errorf("GET: %v, %d", err, r.status)
			}
			if n := s.seen("decode") + s.seen("prefill"); n != 0 {
				t.Errorf("%d requests reached an engine", n)
			}
			s.settled()
		})
	}
}
