// SPDX-License-Identifier: Apache-2.0

package app

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/simulate"
)

// TestMain lets more tests run side by side than there are CPUs: most of them mostly wait.
func TestMain(m *testing.M) {
	flag.Parse()
	if f := flag.Lookup("test.parallel"); f != nil && f.Value.String() == strconv.Itoa(runtime.GOMAXPROCS(0)) {
		if err := f.Value.Set("6"); err != nil {
			panic(err)
		}
	}
	os.Exit(m.Run())
}

// What tests rewrite in shipped configurations, to be gateways unlike ours.
const (
	routeLine    = "                  timeout: 0s\n"
	retryAnyhow  = routeLine + "                  retry_policy: { retry_on: \"5xx,reset,connect-failure,refused-stream\", num_retries: 3 }\n"
	bodyNone     = "response_body_mode: NONE"
	headerSend   = "response_header_mode: SEND"
	trailerSend  = "response_trailer_mode: SEND"
	mutationName = "          # Before the picker: what a client may not say for itself."
	extProcName  = "          - name: envoy.filters.http.ext_proc\n"
)

// withoutMutation takes out the filter that removes control headers before the picker: what is left is Baton's own work.
func withoutMutation(text string) string {
	before, rest, _ := strings.Cut(text, mutationName)
	_, after, _ := strings.Cut(rest, extProcName)
	return before + extProcName + after
}

// replacing is a rewrite of one text by another, pair after pair.
func replacing(pairs ...string) func(string) string {
	return func(text string) string { return strings.NewReplacer(pairs...).Replace(text) }
}

// setFaults gives all engines of a role ("" is all) the same faults.
func (s *stack) setFaults(role string, rules ...simulate.Fault) {
	s.t.Helper()
	for _, e := range s.pool.Engines() {
		if role == "" || e.Role() == role {
			if err := e.SetFaults(simulate.Faults{Rules: rules}); err != nil {
				s.t.Fatal(err)
			}
		}
	}
}

// engines of a role.
func (s *stack) engines(role string) (found []*simulate.Engine) {
	for _, e := range s.pool.Engines() {
		if e.Role() == role {
			found = append(found, e)
		}
	}
	return found
}

// bodies are the requests that the engines of a role recorded.
func (s *stack) bodies(role string) (all []simulate.Recorded) {
	for _, e := range s.engines(role) {
		all = append(all, e.Bodies()...)
	}
	return all
}

// aborts counts what clients of the engines of a role left, in one of the states.
func (s *stack) aborts(role string, states ...string) (n int) {
	for _, e := range s.engines(role) {
		for _, a := range e.Aborts() {
			if slices.Contains(states, a.State) {
				n++
			}
		}
	}
	return n
}

// pulls are the transfers of KV that were made or tried.
func (s *stack) pulls() (all []simulate.Pull) {
	for _, e := range s.pool.Engines() {
		all = append(all, e.Pulls()...)
	}
	return all
}

// writeEndpoints rewrites the file of endpoints; it returns when the first picker knows.
func (s *stack) writeEndpoints(engines ...*simulate.Engine) {
	s.t.Helper()
	var lines []string
	for _, e := range engines {
		line := endpointLines(e.Name(), e.Addr(), e.Role())
		for name, value := range e.Labels() {
			if !strings.Contains(line, name+":") {
				line += fmt.Sprintf("    %s: %q\n", name, value)
			}
		}
		lines = append(lines, line)
	}
	s.writeEndpointLines(lines...)
}

func endpointLines(name string, at netip.AddrPort, role string) string {
	return fmt.Sprintf("- name: %s\n  namespace: default\n  address: %q\n  port: \"%d\"\n  labels:\n    %s: %s\n    %s: \"false\"\n",
		name, at.Addr(), at.Port(), pool.LabelRole, role, pool.LabelSidecar)
}

func (s *stack) writeEndpointLines(lines ...string) {
	s.t.Helper()
	text := "endpoints: []\n"
	if len(lines) > 0 {
		text = "endpoints:\n" + strings.Join(lines, "")
	}
	replaceFile(s.t, s.endpointsFile(), text)
	for _, p := range s.pickers {
		eventually(s.t, "the rewritten endpoints file is read", func() bool { return len(p.app.Snapshot().Endpoints) == len(lines) })
	}
}

// tap is a model server that keeps whatever reaches it, on any path.
type tap struct {
	addr netip.AddrPort

	mu   sync.Mutex
	seen []simulate.Recorded // guarded by mu
}

func newTap(t *testing.T) *tap {
	t.Helper()
	p := &tap{}
	server := httptest.NewServer(p)
	t.Cleanup(server.Close)
	p.addr = netip.MustParseAddrPort(server.Listener.Addr().String())
	return p
}

func (p *tap) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body) // what came is what counts
	if !strings.HasPrefix(r.URL.Path, "/metrics") {
		p.mu.Lock()
		p.seen = append(p.seen, simulate.Recorded{Method: r.Method, URI: r.RequestURI, Header: r.Header.Clone(), Body: body})
		p.mu.Unlock()
	}
	answer := "{}"
	if strings.HasPrefix(r.URL.Path, "/metrics") {
		answer = "vllm:num_requests_running{engine=\"0\",model_name=\"tiny\"} 0\nvllm:num_requests_waiting{engine=\"0\",model_name=\"tiny\"} 0\n"
		w.Header().Set("Content-Type", "text/plain")
	}
	_, _ = io.WriteString(w, answer) // the client may be gone
}

// take returns what came since the last call.
func (p *tap) take() []simulate.Recorded {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := p.seen
	p.seen = nil
	return out
}

// occupy makes an engine with MaxNumSeqs 1 queue everything, until the returned function is called.
func (s *stack) occupy(e *simulate.Engine) (release func()) {
	s.t.Helper()
	ctx, cancel := context.WithCancel(s.t.Context())
	body := `{"model":"tiny","prompt":"occupied","max_tokens":100000,"stream":true}`
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, e.URL()+"/v1/completions", strings.NewReader(body))
	if err != nil {
		s.t.Fatal(err)
	}
	resp, err := s.client.Do(req) //nolint:bodyclose // closed by the goroutine below
	if err != nil {
		s.t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		defer resp.Body.Close()
		_, _ = io.Copy(io.Discard, resp.Body) // ends with the cancellation
	}()
	eventually(s.t, "the engine is occupied", func() bool { return e.Stats().Running == 1 })
	var once bool
	release = func() {
		if !once {
			once = true
			cancel()
			<-ended
		}
	}
	s.t.Cleanup(release)
	return release
}

// single is a pool of engines that serve one request at a time, so that they can be occupied.
func single(prefill, decode int) simulate.PoolOptions {
	o := fast(prefill, decode)
	o.Template.MaxNumSeqs = 1
	o.Template.NumBlocks = 1 << 14
	return o
}

// event reads one server-sent event and forgets it.
func event(t *testing.T, r *bufio.Reader) {
	t.Helper()
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			t.Fatalf("stream ended: %v", err)
		}
		if line == "\n" || line == "\r\n" {
			return
		}
	}
}

// stream is an answer that is being read.
type stream struct {
	*bufio.Reader
	status int
	header http.Header
}

// open sends a streaming chat request of so many tokens through Envoy and returns with the headers of its answer.
func (s *stack) open(ctx context.Context, tokens int) stream {
	s.t.Helper()
	body := strings.Replace(chatBody(100, `,"stream":true`), `"max_tokens":4`, `"max_tokens":`+strconv.Itoa(tokens), 1)
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.envoy.URL+"/v1/chat/completions", strings.NewReader(body))
	if err != nil {
		s.t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := s.client.Do(req)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = resp.Body.Close() })
	return stream{bufio.NewReader(resp.Body), resp.StatusCode, resp.Header}
}

// result of a request sent by chat.
type result struct {
	reply
	err error
}

// chat posts a chat request in the background.
func (s *stack) chat(ctx context.Context, body string, headers ...string) <-chan result {
	out := make(chan result, 1)
	go func() {
		r, err := s.try(ctx, http.MethodPost, "/v1/chat/completions", strings.NewReader(body), headers...)
		out <- result{r, err}
	}()
	return out
}

// whole asserts a 200 of the given outcome whose body came to its proper end.
func (r reply) whole(t *testing.T, outcome string) {
	t.Helper()
	if r.status != http.StatusOK || r.header.Get("x-baton-outcome") != outcome {
		t.Fatalf("status %d, outcome %q, want 200, %q: %.500s", r.status, r.header.Get("x-baton-outcome"), outcome, r.body)
	}
	if strings.HasPrefix(r.header.Get("Content-Type"), "text/event-stream") {
		if !strings.HasSuffix(strings.TrimSpace(r.body), "data: [DONE]") {
			t.Errorf("the stream is cut: …%s", r.body[max(0, len(r.body)-200):])
		}
		return
	}
	if !json.Valid([]byte(r.body)) {
		t.Errorf("not JSON: %.500s", r.body)
	}
}

// unchanged asserts that got is sent with at most one insertion: what a decode request with a handle is.
func unchanged(t *testing.T, what string, got, sent []byte) {
	t.Helper()
	if bytes.Equal(got, sent) {
		return
	}
	n := 0
	for n < len(got) && n < len(sent) && got[n] == sent[n] {
		n++
	}
	rest := sent[n:]
	if !bytes.HasSuffix(got, rest) || len(got) < len(sent) {
		t.Errorf("%s: %d bytes of %d differ beyond one insertion: …%.100s", what, len(got), len(sent), got[n:])
		return
	}
	if inserted := got[n : len(got)-len(rest)]; !bytes.Contains(inserted, []byte(`kv_transfer_params`)) {
		t.Errorf("%s: inserted is %.200s", what, inserted)
	}
}

// delayPrefills makes every prefill from now on wait.
func (s *stack) delayPrefills(d time.Duration) {
	s.t.Helper()
	s.setFaults("prefill", simulate.Fault{Kind: "delay", Phase: "prefill", DelayMS: int(d.Milliseconds())})
}
